"""Digests of a run's steps: what they cover, what a resume and `ckpt` make of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shardlaunch.checkpoints.listing import listed_digests, read_listing
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.state import OPTIMIZER, whole
from shardlaunch.checkpoints.state_digests import digests_of_state
from shardlaunch.launcher.reporting.tracking import METRICS_FILE, recorded_digests
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_exact import ExactNet
from tests.recipes import run_quietly
from tests.unit.checkpoints.saved import tensors
from tests.unit.launcher.commands.ckpt.conftest import Ckpt, ckpt  # noqa: F401 - a fixture

ARGV = ["--exact", "--max-steps", "6", "--eval-every", "100", "--save-every", "2", "--keep", "0"]
ARGV += ["--digest-every", "2", "--log-every", "3"]


def _run(num_ranks: int, run_dir: Path, *words: str) -> tuple[int, str]:
    """Return the exit status, and what the ranks have printed."""
    argv = [*ARGV, "--output-dir", str(run_dir), *words]
    ended: list[tuple[int, str]] = run_on_ranks(num_ranks, run_quietly, ExactNet, argv)
    return max(status for status, _ in ended), "".join(output for _, output in ended)


def _change(run_dir: Path, step: int, name: str) -> None:
    """Let a run have recorded another digest of a step."""
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    for line in lines:
        if line["step"] == step and name in line:
            line[name] = f"{int(line[name], 16) ^ 1:016x}"
    (run_dir / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_runs_are_compared_by_what_they_have_recorded(tmp_path: Path, ckpt: Ckpt) -> None:  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    assert _run(1, one)[0] == 0
    assert _run(3, two, "--strategy", "fsdp2", "--stop-at-step", "4")[0] == 0
    assert _run(2, two, "--strategy", "ddp")[0] == 0, "the loaded weights are those that were recorded"
    steps = recorded_digests(one)
    assert list(steps) == [2, 4, 6], "also where no other metrics are logged"
    assert recorded_digests(two) == steps
    assert len({entry["weights_digest"] for entry in steps.values()}) == 3
    for step in steps:
        listed = listed_digests(read_listing(one / "checkpoints" / f"step-{step:08d}"))
        assert listed.items() <= steps[step].items()
    assert "agree at all 3 steps that both runs have recorded" in ckpt("diff", one, two).out

    _change(two, 4, "optimizer_digest")
    ended = ckpt("diff", one, two)
    assert ended.status == 0, "the checkpoints that are compared are of step 6"
    assert "first difference at step 4: optimizer (equal until step 2; 3 compared)" in ended.out
    assert "need be no fault" not in ended.out, "both runs were to have the same bits"
    document = ckpt("diff", one, two, "--json").document["runs"]
    assert document == {"num_compared": 3, "first_differing": 4, "last_equal": 2, "differing": ["optimizer_digest"]}

    ended = ckpt("verify", two)
    assert ended.status == 1
    assert ended.out.count("damaged") == 1
    assert "manifest.json: the digest of its optimizer's state is" in ended.out


def test_a_resume_from_another_state_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert _run(1, run_dir, "--stop-at-step", "4")[0] == 0
    for name, what in (("optimizer_digest", "optimizer's state"), ("weights_digest", "weights")):
        _change(run_dir, 4, name)
        status, output = _run(1, run_dir)
        assert status == 2
        assert f"step-00000004: the digest of the {what} loaded is" in output
        assert output.count("error: ") == 1
        _change(run_dir, 4, name)  # as it was
    _change(run_dir, 4, name)
    assert _run(1, run_dir, "--digest-every", "0", "--stop-at-step", "5")[0] == 0
    for step in (4, 5):
        shutil.rmtree(run_dir / "checkpoints" / f"step-0000000{step}")
    assert _run(1, run_dir)[0] == 0, "the older one has the state that was recorded"
    assert list(recorded_digests(run_dir)) == [2, 4, 6]


def _digests(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    state = [whole(name, tensor) for name, tensor in weights.items()]
    return digests_of_state([*state, whole("layer.weight", torch.ones(3), section=OPTIMIZER, entry="m")], Peers())


@pytest.mark.parametrize("name", sorted(tensors().keys() - {"nothing"}))  # in one order in all test processes
def test_a_bit_of_any_tensor_is_seen(name: str) -> None:
    weights = {**tensors(), "half": torch.ones(3, dtype=torch.bfloat16)}
    expected = _digests(weights)
    assert _digests(dict(reversed(weights.items()))) == expected, "the order is that of names"
    weights[name].view(-1).view(torch.uint8)[-1] ^= 1
    found = _digests(weights)
    assert found["weights_digest"] != expected["weights_digest"]
    assert found["optimizer_digest"] == expected["optimizer_digest"]


def test_a_digest_is_that_of_the_bytes_in_a_row() -> None:
    from awscrt import checksums

    weights: dict[str, Any] = tensors()
    data = b"".join(weights[name].numpy().tobytes() for name in sorted(weights))
    assert _digests(weights)["weights_digest"] == f"{checksums.crc64nvme(data):016x}"
