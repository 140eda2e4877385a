"""`shardlaunch plan` on a recipe of its own: what it prints, what it refuses, what it leaves alone."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from shardlaunch import UserError
from shardlaunch.launcher.commands.plan import _names, plan_run
from shardlaunch.launcher.planning.cluster import Cluster, wire_bytes
from shardlaunch.launcher.planning.ledger import Collective
from shardlaunch.launcher.planning.simulation import StepCounts, Trace
from shardlaunch.launcher.reporting.planned import comparison_text, planned_peak
from shardlaunch.sharding.world import World
from tests.distributed.ranks import run_on_ranks

RECIPE = """
from dataclasses import dataclass
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from shardlaunch import Options, Recipe, launch

HEADS, LONGEST = 4, 512


@dataclass(kw_only=True)
class ProbeOptions(Options):
    kind: str = ""
    micro_batch_size: int = 8
    precision: str = "bf16"


class Probe(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.table, self.inner, self.head = nn.Embedding(50, 64), nn.Linear(64, 192), nn.Linear(64, 50)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        hidden = self.table(inputs)
        if self.kind == "branches" and hidden.sum() > 0:
            hidden = hidden * 2
        if self.kind == "routes":
            hidden = hidden + hidden[hidden > 0].sum()
        if self.kind == "counts":
            hidden = hidden[:, : int(hidden.argmax())]
        if inputs.max() > 0 and (inputs == 0).any():  # of what the data are, it may decide
            self.seen += 1
        parts = self.inner(hidden).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(*parts, dropout_p=0.1 if self.training else 0.0)
        return self.head(attended.transpose(1, 2).flatten(2))


class ProbeRecipe(Recipe):
    options: ProbeOptions

    def datasets(self):
        return {"train": [torch.arange(4 + (LONGEST - 4) * (number == 40)) % 50 for number in range(64)]}

    def lengths(self, dataset):
        return np.array([len(sample) for sample in dataset])

    def collate(self, samples, seeds):
        return {"inputs": nn.utils.rnn.pad_sequence(samples, batch_first=True)}

    def num_targets(self, batch):
        return batch["inputs"].numel()

    def model(self):
        return Probe(self.options.kind)

    def weights(self):
        raise AssertionError("weights are read")

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs.float().flatten(0, 1), batch["inputs"].flatten(), reduction="sum")


launch(ProbeRecipe)
"""
SCORES_BYTES = 8 * 4 * 512 * 512 * 4  # of 8 samples, in float32


def _plans(folder: str, cases: list[tuple[dict[str, Any], str, list[str]]]) -> tuple[list[Any], list[str]]:
    """Return for each cluster, strategy and words its status and document, or the message; then what lies there."""
    os.chdir(folder)
    Path("probe.py").write_text(RECIPE)
    found: list[Any] = []
    for cluster, strategy, words in cases:
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                status = plan_run(Path("probe.py"), words, Cluster(**cluster), strategy=strategy, as_json=True)
            found.append((status, json.loads(out.getvalue())))
        except UserError as error:
            found.append(str(error))
    return found, sorted(path.name for path in Path().iterdir())


def test_plan_command(tmp_path: Path) -> None:
    one, four = {"ranks": 1}, {"ranks": 4}
    small = {"ranks": 4, "gpu_gib": 0.005, "reserve_gib": 0.0}
    cases: list[tuple[dict[str, Any], str, list[str]]] = [
        (four, "auto", []),
        (small, "fsdp2", ["--micro-batch-size", "32"]),
        ({**small, "gpu_gib": 0.0001}, "ddp", []),
        (four, "fsdp2", ["--cpu-offload", "--digest-every", "1"]),
        (one, "single", ["--kind", "branches"]),
        (one, "single", ["--kind", "routes"]),
        (one, "single", ["--kind", "counts"]),
        (four, "ddp", ["--cpu-offload"]),
        (four, "single", []),
        (four, "fsdp3", []),
        (four, "ddp", ["--strategy", "fsdp2"]),
        (four, "fsdp2", ["--tensor-parallel", "2"]),
        (one, "single", ["--exact"]),
    ]
    ((found, files),) = run_on_ranks(1, _plans, str(tmp_path), cases)
    (status, document), (small_status, suggested), (least_status, none), (_, offloaded), *refused = found
    assert (status, small_status, least_status) == (0, 1, 1)
    assert files == ["__pycache__", "probe.py"] or files == ["probe.py"]

    plans = {plan["strategy"]: plan for plan in document["strategies"]}
    assert document["fastest"] in plans
    assert {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"} == plans.keys()
    ddp, fsdp2 = plans["ddp"], plans["fsdp2"]
    num_parameters = 50 * 64 + 64 * 192 + 192 + 64 * 50 + 50
    assert ddp["memory"]["parameters"] == pytest.approx(4 * num_parameters, rel=0.05)
    assert fsdp2["memory"]["optimizer"] < ddp["memory"]["optimizer"] / 3
    assert ddp["save_bytes"] == pytest.approx(12 * num_parameters, rel=0.01)
    assert ddp["wire_bytes"] == pytest.approx(2 * 3 / 4 * 4 * num_parameters, rel=0.01)
    assert "longest" in document["assumed"][0]
    assert all(plan["memory"]["reserved"] >= plan["memory"]["peak"] for plan in plans.values())
    # The batch of the longest sample, whose attention a GPU does without keeping probabilities.
    activations = ddp["memory"]["activations"]
    assert 8 * 512 * (64 + 192 + 64 + 50) * 2 < activations < SCORES_BYTES

    assert suggested["fastest"] is None
    assert suggested["suggestion"]["changes"]["micro_batch_size"] < 32
    assert suggested["suggestion"]["fits"]
    assert none["suggestion"] is None
    shards = fsdp2["memory"]["parameters"] + fsdp2["memory"]["gradients"] + fsdp2["memory"]["optimizer"]
    (plan,) = offloaded["strategies"]
    assert plan["memory"]["host"] == pytest.approx(shards, rel=0.05)
    assert plan["memory"]["peak"] < fsdp2["memory"]["peak"]

    for message, words in zip(
        refused,
        (
            "decides by a value (bool)",
            "cannot be run on tensors without values",
            "decides by a value (int64)",
            "ddp: --cpu-offload: ddp does not shard",
            "--strategy single is for one process, not --ranks 4",
            "unknown strategy 'fsdp3'",
            "two strategies were requested",
            "--tensor-parallel: is not planned",
            "--exact: is not planned",
        ),
        strict=True,
    ):
        assert isinstance(message, str), message
        assert words in message


def test_strategies_that_are_planned() -> None:
    assert [*_names("auto", "auto", 1)] == ["single", "fsdp2"]
    assert [*_names("auto", "auto", 2)] == ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
    assert [*_names("auto", "zero3", 1)] == ["zero3"]
    with pytest.raises(UserError, match="--strategy dp: keeps on each GPU what single keeps on one; plan --strategy"):
        _names("dp", "auto", 8)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ranks": 0}, "--ranks 0: must be at least 1"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0: must be at least 1"),
        ({"gpu_gib": float("nan")}, "--gpu-memory nan: must be above 0"),
        ({"network_gbps": -1.0}, "--network-bandwidth -1: must be above 0"),
        ({"reserve_gib": 90.0}, "leaves nothing of --gpu-memory 80"),
    ],
)
def test_clusters_that_cannot_be(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Cluster(**{"ranks": 8, **changed})


def test_bytes_and_times_of_collectives() -> None:
    cluster = Cluster(ranks=16, node_gbps=100.0, network_gbps=10.0)
    gathered = Collective("all-gather", range(16), 16 * 10**9)
    assert wire_bytes(gathered) == 15e9
    assert wire_bytes(gathered._replace(kind="all-reduce")) == 30e9
    assert cluster.collective_s(gathered) == pytest.approx(1.5, rel=0.01)
    assert cluster.collective_s(gathered._replace(ranks=range(8))) == pytest.approx(0.14, rel=0.01)
    assert cluster.collective_s(gathered._replace(ranks=range(0, 16, 8))) == pytest.approx(0.8, rel=0.01)
    assert cluster.collective_s(gathered._replace(ranks=range(1))) == 0


def test_steps_of_more_micro_batches_than_were_run() -> None:
    once, each = Collective("all-reduce", range(2), 8), Collective("all-gather", range(2), 8)
    trace = Trace(events=[], steps=[StepCounts(1, 100, {once: 1, each: 3}), StepCounts(2, 180, {once: 1, each: 6})])
    assert trace.flops_per_step(4) == 340
    assert trace.per_step(4) == {once: 1, each: 12}


def test_plan_beside_a_run(tmp_path: Path) -> None:
    assert comparison_text(3 << 30, 4 << 30) == "memory: 3.00 GiB planned, 4.00 GiB used at most on a rank (-25.0 %)"
    with pytest.raises(UserError, match="this run uses none"):
        planned_peak(str(tmp_path / "plan.json"), "ddp", World())
