"""LoRA beside a base in 8 bits: it starts as that base, is the same run on any ranks, and is saved as without."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shardlaunch.checkpoints.finding import checkpoint_at
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.launcher.commands.adapters import with_adapter
from shardlaunch.launcher.commands.ckpt.exporting import export
from shardlaunch.launcher.commands.export import main as export_of_formats
from shardlaunch.launcher.commands.trained import open_run
from tests.distributed.ranks import run_on_ranks
from tests.lora_recipe import Tokens, TokensOptions, save_base
from tests.recipes import bits, losses, run_quietly, run_well

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ALL = 60  # samples: one global batch
STEPS = ("--global-batch-size", str(ALL), "--micro-batch-size", "20")
VARIANTS = {"plain": (), "exact": ("--exact",), "dora": ("--dora",)}


def _run(argvs: Sequence[Sequence[str]]) -> None:
    for argv in argvs:
        run_well(Tokens, list(argv))


def _argv(folder: Path, name: str, *words: str) -> list[str]:
    where = ["--model", str(folder / "base"), "--output-dir", str(folder / name)]
    return [*where, "--lora-rank", "2", "--lora-base-bits", "8", *STEPS, *words]


def _save_quantized(folder: Path, base: Path) -> None:
    """Write a base model with the values that those of its linear layers have in 8 bits."""
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            weight = tensor.numpy()
            scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127.5)
            tensors[name] = torch.from_numpy(np.clip(np.rint(weight * (1 / scales)), -128, 127) * scales)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, and runs on one rank beside it in 8 bits, of all of the data in each step."""
    folder = tmp_path_factory.mktemp("quantized")
    save_base(folder / "base")
    _save_quantized(folder / "base-in-8-bits", folder / "base")
    resumed = ("--resume", str(folder / "plain/checkpoints/step-00000002"))
    words = [_argv(folder, name, *variant) for name, variant in VARIANTS.items()]
    full = ["--model", str(folder / "base-in-8-bits"), "--output-dir", str(folder / "full"), *STEPS, "--max-steps", "1"]
    _run([full, *words, _argv(folder, "again", *resumed)])
    return folder


def test_adapters_begin_as_the_base_in_8_bits(runs: Path) -> None:
    first = losses(runs / "full")[1]
    near = pytest.approx(first, abs=1e-6)
    assert [losses(runs / name)[1] for name in VARIANTS] == [first, near, near]
    assert len(set(losses(runs / "plain").values())) == 3


def test_a_resume_is_of_the_same_bits(runs: Path) -> None:
    lines, position, tensors = bits(runs / "plain")
    assert bits(runs / "again") == ([line for line in lines if line["step"] > 2], position, tensors)


def test_adapters_are_the_same_run_on_two_ranks(runs: Path) -> None:
    run_on_ranks(2, _run, [_argv(runs, f"{name}-2", *words) for name, words in VARIANTS.items()])
    for name in VARIANTS:
        bound = 0 if name == "exact" else 1e-6
        assert losses(runs / f"{name}-2") == pytest.approx(losses(runs / name), abs=bound), name


def test_a_checkpoint_is_one_of_adapters_on_the_base_as_it_is_stored(runs: Path, tmp_path: Path) -> None:
    run_well(Tokens, ["--model", str(runs / "base"), "--output-dir", str(tmp_path), "--lora-rank", "2", *STEPS])
    floating, quantized = (run / "checkpoints/step-00000003" for run in (tmp_path, runs / "plain"))
    assert (quantized / "base.json").read_bytes() == (floating / "base.json").read_bytes()
    files = [sorted(file.name for file in folder.iterdir()) for folder in (floating, quantized)]
    assert files[0] == files[1]
    names = [set(load_file(folder / "adapter_model.safetensors")) for folder in (floating, quantized)]
    assert names[0] == names[1]
    before, after = (_model(runs / "plain", step).state_dict() for step in (2, 3))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "lora_" in name or name.endswith("score.weight")}


def _model(run: Path, step: int) -> nn.Module:
    return open_run(run, step=step, recipe_path=str(_RECIPE), warn=pytest.fail, on_cpu=True).model()


_RECIPE = Path(__file__).parents[1] / "lora_recipe.py"


def _loss_of(model: Any) -> float:
    batch = Tokens(TokensOptions()).datasets()["train"].columns
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"]).item()


def test_the_commands_compute_as_the_training_did_and_merge_into_the_base_in_floating_point(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    run = runs / "plain"
    third = losses(run)[3]  # the loss before the third update
    step_dir = checkpoint_at(run, step=2, warn=pytest.fail)
    assert _loss_of(with_adapter(open_checkpoint(step_dir, peers=Peers()))) == pytest.approx(third, abs=1e-6)
    assert _loss_of(_model(run, 2)) == pytest.approx(third, abs=1e-6)

    base = AutoModelForSequenceClassification.from_pretrained(
        runs / "base", config=AutoConfig.from_pretrained(step_dir)
    )
    expected = _loss_of(peft.PeftModel.from_pretrained(base, step_dir))
    assert abs(expected - third) > 1e-5
    export(run, tmp_path / "out", step=2, dtype=None, shard_size="", merge=True, ema=False, as_json=False)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert _loss_of(merged) == pytest.approx(expected, abs=1e-6)
    assert "kept the base model in 8 bits" in capsys.readouterr().err
    assert "merged into the base model in floating point" in (tmp_path / "out/README.md").read_text()
    export_of_formats.export_run(run, tmp_path / "hf", kind="hf", step=2, ema=False, recipe=str(_RECIPE))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert _loss_of(merged) == pytest.approx(expected, abs=1e-6)
    assert "kept the base model in 8 bits" in capsys.readouterr().err


def test_what_is_said_and_what_is_refused(runs: Path) -> None:
    output = run_well(Tokens, _argv(runs, "said", "--stop-at-step", "1"))
    assert "and all of score; base in 8 bits: 14 layers, 9.5 kB instead of 21.6 kB" in output
    record = json.loads((runs / "said/run.json").read_text())
    assert record["identity"]["--lora-base-bits"] == 8
    refusals = {
        "--lora-base-bits: 8 -> 0": _argv(runs, "said", "--lora-base-bits", "0"),
        "--lora-base-bits 4: ": _argv(runs, "no", "--lora-base-bits", "4"),
        "--lora-base-bits: has no effect without adapters": _argv(runs, "no", "--lora-rank", "0"),
        **{
            f"--lora-base-bits: not under {name}, which takes weights in floating point only": _argv(
                runs, "no", "--strategy", name
            )
            for name in ("fsdp2", "zero1", "zero3")
        },
    }
    for complaint, argv in refusals.items():
        status, output = run_quietly(Tokens, argv)
        assert (status, complaint in output) == (2, True), output
    assert not (runs / "no/checkpoints").exists()
