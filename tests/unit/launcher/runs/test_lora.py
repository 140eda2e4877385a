"""LoRA by options, in one process: what peft and the commands make of a checkpoint, and what is refused."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from shardlaunch import UserError
from shardlaunch.launcher.commands.ckpt.exporting import export
from shardlaunch.launcher.commands.generate import Sampling, generate_texts
from shardlaunch.launcher.commands.predict import predict_texts
from shardlaunch.recipes.bert_imdb import BertImdb
from shardlaunch.recipes.gpt_lm import GptLm
from shardlaunch.text import train_tokenizer
from tests.lora_recipe import Tokens, TokensOptions, save_base
from tests.recipes import NetRecipe, losses, run_quietly, run_well, save_small_bert

peft = pytest.importorskip("peft")
ALL = 60  # samples: one global batch
STEPS = ("--max-steps", "3", "--global-batch-size", str(ALL), "--micro-batch-size", "20")
LAST = "checkpoints/step-00000003"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, and runs with adapters, of which each step is on all of the data."""
    folder = tmp_path_factory.mktemp("lora")
    save_base(folder / "base")
    variants = {
        "plain": (),
        "dora": ("--dora", "--rslora", "--lora-targets", "q_proj", "mlp.down_proj"),
        "average": ("--swa-from", "2"),
    }
    for name, words in variants.items():
        run_well(Tokens, _argv(folder, name, *STEPS, *words))
    return folder


def _argv(folder: Path, name: str, *words: str) -> list[str]:
    return ["--model", str(folder / "base"), "--output-dir", str(folder / name), "--lora-rank", "4", *words]


def _export(
    run: Path, out: Path, *, merge: bool, step: int | None = None, shard_size: str = "", ema: bool = False
) -> None:
    export(run, out, step=step, dtype=None, shard_size=shard_size, merge=merge, ema=ema, as_json=False)


def _error(words: Sequence[str], recipe_type: Any = Tokens) -> str:
    status, output = run_quietly(recipe_type, list(words))
    assert status == 2, output
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    return errors[0]


def _loss_of(model: nn.Module) -> float:
    batch = Tokens(TokensOptions()).datasets()["train"].columns
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"]).item()


def _with_peft(run: Path, step: int) -> Any:
    """Load the adapter of a checkpoint as another program would."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    step_dir = run / f"checkpoints/step-{step:08d}"
    config = AutoConfig.from_pretrained(step_dir)
    base = AutoModelForSequenceClassification.from_pretrained(run.parent / "base", config=config)
    return peft.PeftModel.from_pretrained(base, step_dir)


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_peft_loads_a_checkpoint_and_an_export_is_the_merged_model(name: str, runs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    run = runs / name
    assert _loss_of(_with_peft(run, 2)) == pytest.approx(losses(run)[3], abs=1e-6)  # the loss before the third update
    assert abs(losses(run)[3] - losses(run)[2]) > 1e-4
    sizes = [sum(file.stat().st_size for file in it.glob("*.safetensors")) for it in (runs / "base", run / LAST)]
    assert {file.name for file in (run / LAST).glob("*.safetensors")} == {
        "adapter_model.safetensors",
        "optimizer-00001-of-00001.safetensors",
    }
    assert sizes[1] < 2 * sizes[0]  # of a base of 5,000 elements; with it and its optimizer state it would be 3 times
    _export(run, tmp_path / "out", step=3, merge=True)
    merged, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert _loss_of(merged) == pytest.approx(_loss_of(_with_peft(run, 3)), abs=1e-6)
    assert "from peft" in (run / LAST / "README.md").read_text()
    assert "from peft" not in (tmp_path / "out" / "README.md").read_text()
    _export(run, tmp_path / "adapter", merge=False)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    config = json.loads((run / LAST / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8, ["score"])
    assert sorted(config["target_modules"])[0] == "down_proj"


def test_an_average_of_adapters_is_exported_as_they_are(runs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    run = runs / "average"
    model, before = _with_peft(run, 3), _with_peft(run, 2).state_dict()
    model.load_state_dict({name: (value + before[name]) / 2 for name, value in model.state_dict().items()})
    expected = _loss_of(model)
    assert abs(expected - _loss_of(_with_peft(run, 3))) > 1e-4
    for name, is_merged in (("adapter", False), ("merged", True)):
        _export(run, tmp_path / name, step=3, merge=is_merged, ema=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert _loss_of(merged) == pytest.approx(expected, abs=1e-6)
    base = AutoModelForSequenceClassification.from_pretrained(runs / "base", config=merged.config)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert _loss_of(adapted) == pytest.approx(expected, abs=1e-6)


def test_what_trains_is_said_and_all_else_stays(runs: Path, tmp_path: Path) -> None:
    output = run_well(Tokens, _argv(runs, str(tmp_path / "run"), *STEPS, "--stop-at-step", "1"))
    assert "2,032 of 7,424 parameters train (27.37%): LoRA of rank 4, alpha 8, on 14 layers, and all of score" in output
    before = _with_peft(runs / "plain", 2).state_dict()
    after = _with_peft(runs / "plain", 3).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    unused = {"base_model.model.score.original_module.weight"}  # the base's head, drawn as it is loaded
    assert changed - unused == {name for name in after if "lora_" in name or "modules_to_save" in name}


def test_a_base_model_that_changed_or_is_gone_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    argv = _argv(tmp_path, "run", *STEPS)
    run_well(Tokens, [*argv, "--stop-at-step", "1"])
    assert json.loads((tmp_path / "run/checkpoints/step-00000001/base.json").read_text())["model"] == argv[1]
    shutil.rmtree(tmp_path / "base")
    assert f"--model {argv[1]}: not found locally" in _error(argv)
    save_base(tmp_path / "base", seed=1)
    assert "step-00000001: its adapters were trained beside other weights than those that" in _error(argv)
    with pytest.raises(UserError, match="has other weights now than in training"):
        _export(tmp_path / "run", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_predict_and_generate_use_the_base_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the layers of GPT-2, which keep their weights transposed, get adapters too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = [f"film {number} is {'good' if number % 2 else 'bad'}" for number in range(24)]
    pd.DataFrame({"text": texts, "label": [number % 2 for number in range(24)]}).to_csv(tmp_path / "data.csv")
    save_small_bert(tmp_path / "bert")
    size = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    tokenizer = train_tokenizer(texts, vocab_size=280, eos_token="</s>", bos_token="</s>")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")

    def argv(model: str, *words: str) -> list[str]:
        where = ["--model", str(tmp_path / model), "--output-dir", str(tmp_path / f"{model}-run")]
        short = ["--max-steps", "2", "--global-batch-size", "8", "--micro-batch-size", "4", "--tracker", "none"]
        return [*where, *short, "--data", str(tmp_path / "data.csv"), "--lr", "0.1", "--lora-rank", "2", *words]

    def generated(run: str) -> str:
        capsys.readouterr()
        generate_texts(tmp_path / run, prompts=["film"], file=None, max_new_tokens=3, sampling=Sampling())
        return capsys.readouterr().out

    run_well(BertImdb, argv("bert"))
    capsys.readouterr()
    predict_texts(tmp_path / "bert-run", texts=texts[:3], file=None)
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(UserError, match="not a checkpoint of a language model"):
        generated("bert-run")
    assert "on 4 layers" in run_well(GptLm, argv("gpt", "--context-length", "16", "--dora"))
    _export(tmp_path / "gpt-run", tmp_path / "merged", merge=True)
    whole, info = GPT2LMHeadModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert whole.transformer.wte.weight is whole.lm_head.weight
    tokens = whole.generate(tokenizer("film", return_tensors="pt")["input_ids"], max_new_tokens=3, do_sample=False)
    assert generated("gpt-run") == tokenizer.decode(tokens[0]) + "\n"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(UserError, match="has other weights now"):
        generated("gpt-run")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ("--lora-targets", "q_proj", "query"),
            "--lora-targets query: no linear layer with pretrained weights of its own",
        ),
        (("--lora-targets", "score"), "--lora-targets score: no linear layer with pretrained weights of its own"),
        (("--lora-targets", "embed_tokens"), "available: q_proj, k_proj"),
        (("--lora-rank", "0", "--lora-alpha", "3"), "--lora-alpha: has no effect without adapters"),
        (("--lora-rank", "-1"), "--lora-rank -1: must be at least 0"),
        (("--lora-dropout", "1"), "--lora-dropout 1.0: must be"),
        (("--freeze", "model.*"), "--freeze: not with --lora-rank"),
        (("--strategy", "fsdp2", "--tensor-parallel", "2"), "--tensor-parallel: not with --lora-rank"),
        (("--precision", "fp8"), "--precision fp8: not with --lora-rank"),
        (("--model", ""), "this model has no pretrained weights"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], complaint: str, runs: Path, tmp_path: Path) -> None:
    assert complaint in _error(_argv(runs, str(tmp_path / "run"), *words))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_models_and_what_is_no_whole_model_are_refused(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--output-dir", str(tmp_path / "run"))
    assert "is for transformers models, but this recipe's model is a Net" in _error(
        ["--lora-rank", "2", *out], NetRecipe
    )
    adapter = str(runs / "plain" / LAST)
    assert "holds an adapter, without its base model" in _error(["--init-from", adapter, *out])
    assert "holds an adapter, without its base model" in _error(["--model", adapter, *out])
    with pytest.raises(UserError, match="--shard-size: peft reads an adapter from one file"):
        _export(runs / "plain", tmp_path / "out", shard_size="1MB", merge=False)
    monkeypatch.setattr("shardlaunch.launcher.optimization.lora.find_spec", lambda name: None)
    assert 'peft is not installed: pip install "shardlaunch[lora]"' in _error(_argv(runs, str(tmp_path / "run")))
