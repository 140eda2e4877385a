"""`ckpt export` and `ckpt average` write model folders that others load, with the right numbers, or nothing."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shardlaunch.checkpoints import comparing
from tests.unit.checkpoints.saved import flip, save_step, tensors, weights_file
from tests.unit.launcher.commands.ckpt.conftest import Ckpt, make_run


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def _assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def _saved_model(folder: Path, model: nn.Module, step: int, aliases: Mapping[str, str], **of_step: Any) -> Path:
    """Save a model of transformers as a run does."""
    model.save_pretrained(folder / "plain")  # type: ignore[operator]
    files = {"config.json": (folder / "plain" / "config.json").read_text(), **of_step.pop("files", {})}
    weights = {name: it.detach() for name, it in model.state_dict().items() if name not in aliases}
    return save_step(folder / "run" / "checkpoints", step, weights=weights, aliases=aliases, files=files, **of_step)


@pytest.mark.parametrize("piece_elements", [1 << 20, 3])
def test_an_export_has_the_weights_and_what_makes_a_model_folder(
    piece_elements: int, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "PIECE_ELEMENTS", piece_elements)
    card = (
        'for file in sorted(Path(".").glob("model-*.safetensors")):\n\n'
        "The files `optimizer-*.safetensors` and `trainer_state.json` serve only to resume the run.\n\n## Versions\n"
    )
    files = {"config.json": '{"dtype": "float32", "text_config": {"dtype": "float32"}}', "README.md": card}
    files["1_Pooling/config.json"] = '{"dtype": "float32"}'  # that of a module, of which no weights are written
    run = make_run(tmp_path / "run", files=files)
    ended = ckpt("export", run / "best", tmp_path / "whole")
    assert (ended.status, ended.err) == (0, "")
    assert sorted(os.listdir(tmp_path / "whole")) == ["1_Pooling", "README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "whole/1_Pooling/config.json").read_text() == files["1_Pooling/config.json"]
    _assert_same(_loaded(tmp_path / "whole"), tensors(seed=4))
    text = (tmp_path / "whole" / "README.md").read_text()
    assert "optimizer" not in text
    assert 'glob("model*.safetensors")' in text
    (tmp_path / "half").mkdir()  # an empty folder is as good as none
    words = ("--dtype", "bf16", "--shard-size", "60B", "--json")
    ended = ckpt("export", run, tmp_path / "half", *words, "--step", "2")
    exported = ended.document
    assert (exported["num_tensors"], exported["num_elements"], exported["num_bytes"]) == (5, 49, 2 * 48 + 8)
    expected = {name: it.bfloat16() if it.is_floating_point() else it for name, it in tensors(seed=2).items()}
    _assert_same(_loaded(tmp_path / "half"), expected)
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == exported["num_bytes"]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "half" / file)
    assert len(set(index["weight_map"].values())) == 2
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    assert not list(tmp_path.glob(".staging-*"))


def test_transformers_loads_an_export_of_tied_weights(tmp_path: Path, ckpt: Ckpt) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=11, max_position_embeddings=6, **size)).eval()
    tied = "cls.predictions.decoder"
    aliases = {f"{tied}.weight": "bert.embeddings.word_embeddings.weight", f"{tied}.bias": "cls.predictions.bias"}
    _saved_model(tmp_path, model, 3, aliases)
    inputs = torch.arange(5).view(1, 5)
    for words, dtype, tolerance in (((), torch.float32, 0), (("--dtype", "bf16"), torch.bfloat16, 0.1)):
        out = tmp_path / f"out-{dtype}"
        assert ckpt("export", tmp_path / "run", out, *words, "--shard-size", "500B").status == 0
        loaded, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
        assert loaded.dtype == dtype
        assert not any(info.values()), info
        assert (loaded.eval()(inputs).logits.float() - model(inputs).logits).abs().max() <= tolerance


def test_what_a_dtype_cannot_hold_is_refused_or_said(tmp_path: Path, ckpt: Ckpt) -> None:
    weights = {"a": torch.tensor([1.0, 7e4, -1e5]), "b": torch.tensor([1e-30, 65504.0]), "c": torch.tensor([1e9])}
    step_dir = save_step(tmp_path / "a", 2, weights=weights)
    ended = ckpt("export", step_dir, tmp_path / "out", "--dtype", "fp16")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == ("error: --dtype: 3 values would become infinite, in a, c; bf16 has the range of fp32\n")
    assert not list(tmp_path.glob("*out*"))
    ended = ckpt("export", step_dir, tmp_path / "out", "--dtype", "bf16")
    assert ended.status == 0
    small = {"b": torch.tensor([1e-30, 65504.0, float("inf"), float("nan")])}
    ended = ckpt("export", save_step(tmp_path / "b", 2, weights=small), tmp_path / "small", "--dtype", "fp16")
    assert ended.status == 0
    assert "  1 values that are not 0 became 0" in ended.out
    assert "2 values are not finite, as in the checkpoint" in ended.out


def test_an_average_is_the_mean(tmp_path: Path, ckpt: Ckpt) -> None:
    run = make_run(tmp_path / "run", (2, 4, 6), files={"README.md": "# mine\n"})
    step_dirs = sorted((run / "checkpoints").iterdir())
    for words, shares in (((), (1, 1, 1)), (("--weights", "1", "0", "3"), (1, 0, 3))):
        out = tmp_path / f"out-{shares[1]}"
        ended = ckpt("average", *step_dirs, out, *words)
        assert (ended.status, ended.err) == (0, "")
        expected = tensors(seed=6)
        for name, last in expected.items():
            if last.is_floating_point():
                parts = [tensors(seed=step)[name].double() for step in (2, 4, 6)]
                parts = [part * share for part, share in zip(parts, shares, strict=True)]
                expected[name] = (torch.stack(parts).sum(0) / sum(shares)).float()
        found = _loaded(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=0)
        assert "the mean of those of steps 2, 4, 6" in (out / "README.md").read_text()
    # In float64: a mean of large and small numbers that fp32 sums would lose.
    values = (1e8, 1.0, -1e8, 1.0)
    large = [save_step(tmp_path / f"{n}", 2, weights={"w": torch.tensor([it])}) for n, it in enumerate(values)]
    assert ckpt("average", *large, tmp_path / "sum").status == 0
    assert _loaded(tmp_path / "sum")["w"].tolist() == [0.5]


def test_counts_are_those_of_the_last_checkpoint(tmp_path: Path, ckpt: Ckpt) -> None:
    one = save_step(tmp_path / "a", 2, weights={"w": torch.ones(2), "count": torch.tensor(3)})
    other = save_step(tmp_path / "b", 4, weights={"w": torch.zeros(2), "count": torch.tensor(9)})
    ended = ckpt("average", one, other, tmp_path / "out", "--json")
    assert (ended.status, ended.document["of_last"]) == (0, ["count"])
    assert f"not averaged, but of {other}: count" in ended.err
    _assert_same(_loaded(tmp_path / "out"), {"w": torch.full((2,), 0.5), "count": torch.tensor(9)})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("average", "a", "out"), "at least two checkpoints are required"),
        (("average", "a", "a", "out"), "is given twice"),
        (("average", "a", "b", "out", "--weights", "1"), "--weights: 1 numbers for 2 checkpoints"),
        (("average", "a", "b", "out", "--weights", "0", "0"), "not all 0"),
        (("average", "a", "b", "out", "--weights", "nan", "1"), "must be finite"),
        (("average", "a", "b", "out", "--weights", "-1", "2"), "at least 0"),
        (("average", "a", "names", "out"), "are of different models: only one of them has other"),
        (("average", "a", "shape", "out"), "are of different models: layer.weight is [8, 4] torch.float32 and [2]"),
        (("average", "nan", "nan2", "out"), "layer.weight: holds values that are not finite"),
        (("average", "a", "b", "a/out"), "is in the checkpoint itself"),
        (("export", "a", "full"), "exists and is no empty folder"),
        (("export", "a", "file"), "exists and is no empty folder"),
        (("export", "a", "a/out"), "is in the checkpoint itself"),
        (("export", "a", "a"), "is in the checkpoint itself"),
        (("export", "a", "/proc/none/out"), "No such file or directory"),
        (("export", "a", "out", "--shard-size", "0GB"), "--shard-size 0GB: is no size"),
        (("export", "a", "out", "--shard-size", "many"), "write it as in 5GB"),
        (("export", "a", "out", "--merge"), "holds no model of peft"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    words: tuple[str, ...], complaint: str, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nan = {"layer.weight": torch.tensor([float("nan")])}
    others = {
        "a": tensors(),
        "b": tensors(),
        "names": {**tensors(), "other": torch.ones(1)},
        "shape": {**tensors(), "layer.weight": torch.ones(2)},
        "nan": nan,
        "nan2": nan,
    }
    for name, weights in others.items():
        save_step(tmp_path / f"saved-{name}", 2, weights=weights).rename(name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    ended = ckpt(*words)
    assert (ended.status, ended.out) == (2, "")
    assert complaint in ended.err
    assert ended.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_weights_are_not_exported(tmp_path: Path, ckpt: Ckpt) -> None:
    one, other = save_step(tmp_path, 2), save_step(tmp_path, 4)
    flip(next(other.glob("optimizer-*")))
    assert ckpt("export", other, tmp_path / "optimizer-does-not-matter").status == 0
    flip(weights_file(other))
    for words in (("export", other), ("average", one, other)):
        ended = ckpt(*words, tmp_path / "out")
        assert (ended.status, ended.out) == (1, "")
        assert "model-00001-of-00001.safetensors: the file is damaged" in ended.err
    assert not (tmp_path / "out").exists()


def _adapted(config: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, str]]:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=11, max_position_embeddings=8, **size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    written = json.dumps(model.peft_config["default"].to_dict(), default=list)
    return model, {"adapter_config.json": written}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5},
        {"target_modules": ["v_proj"], "lora_alpha": 3, "use_rslora": True, "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "rslora"],
)
def test_an_adapter_is_merged_as_peft_does(config: Mapping[str, Any], tmp_path: Path, ckpt: Ckpt) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model, files = _adapted(config)
    weights = {name: it.detach().clone() for name, it in model.state_dict().items()}
    base: Any = model.base_model
    files = {**files, "config.json": base.model.config.to_json_string()}
    step_dir = save_step(tmp_path, 2, weights=weights, files=files)
    ended = ckpt("export", step_dir, tmp_path / "as-it-is")
    assert ended.status == 0
    assert "--merge merges them" in ended.err
    _assert_same(_loaded(tmp_path / "as-it-is"), weights)
    ended = ckpt("export", step_dir, tmp_path / "out", "--merge")
    assert (ended.status, ended.err) == (0, "")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged: Any = model.merge_and_unload()  # type: ignore[operator]
    expected = merged.state_dict()
    found = _loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.lm_head.weight, found["lm_head.weight"])


@pytest.mark.parametrize(
    ("config", "changed", "complaint"),
    [
        ({"use_dora": True}, {}, "uses use_dora, which cannot be merged here; merge_and_unload of peft can"),
        ({}, {"alpha_pattern": {"q_proj": 4}}, "uses alpha_pattern"),
        ({}, {"peft_type": "IA3"}, "is of an adapter of type IA3; only LORA can be merged"),
        ({}, {"r": None}, "has no r and lora_alpha"),
        ({}, None, "has no adapter_config.json"),
        ({"target_modules": ["embed_tokens"]}, {}, "no LoRA adapter of layers with a weight matrix"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(
    config: Mapping[str, Any], changed: Mapping[str, Any] | None, complaint: str, tmp_path: Path, ckpt: Ckpt
) -> None:
    pytest.importorskip("peft")
    model, files = _adapted({"target_modules": ["q_proj"], **config})
    written = {**json.loads(files["adapter_config.json"]), **(changed or {})}
    files = {} if changed is None else {"adapter_config.json": json.dumps(written)}
    weights = {name: it.detach() for name, it in model.state_dict().items()}
    ended = ckpt("export", save_step(tmp_path, 2, weights=weights, files=files), tmp_path / "out", "--merge")
    assert (ended.status, ended.out) == (2, "")
    assert complaint in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
