"""`predict` and `generate` use what a checkpoint's manifest lists and nothing beside it, and refuse what is damaged."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from shardlaunch import UserError
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.records import Position, to_json
from shardlaunch.checkpoints.shares import share_of
from shardlaunch.checkpoints.state import EMA, whole
from shardlaunch.checkpoints.writer import save
from shardlaunch.launcher.commands.generate import Sampling, generate_texts
from shardlaunch.launcher.commands.predict import predict_texts
from shardlaunch.launcher.commands.predict_file import predict_rows
from shardlaunch.text import save_config, train_tokenizer
from tests.faults.records import change_json
from tests.unit.checkpoints.saved import sign

TEXTS = ("a fine film", "a dull one")
LABELS = {0: "bad\x1b[31m", 1: "good\nor so"}


def _save(folder: Path, model: Any, *, max_length: Any = 8, averages: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a checkpoint of a small model with a tokenizer, and averages of its weights, if any."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

    def export(staging: Path) -> None:
        save_config(model, staging)
        tokenizer.save_pretrained(staging)
        run = {"identity": {}, "warn": {}}
        record = {"recipe": "mine.Mine", "options": {"max_length": max_length}, "run": run}
        (staging / "recipe.json").write_bytes(to_json(record))

    state = [whole(name, tensor) for name, tensor in model.named_parameters()]
    state += [whole(name, tensor, section=EMA) for name, tensor in (averages or {}).items()]
    share = share_of(state)
    return save(
        folder / "checkpoints", position=Position(step=1), share=share, export=export, aliases={}, peers=Peers()
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=300, id2label=LABELS, label2id={v: k for k, v in LABELS.items()}, **sizes)
        return _save(tmp_path_factory.mktemp("classifier"), BertForSequenceClassification(config))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=300, max_position_embeddings=32, **sizes)
        return _save(tmp_path_factory.mktemp("generator"), LlamaForCausalLM(config))


def _predicted(path: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    predict_texts(path, texts=TEXTS, file=None, **options)
    return capsys.readouterr().out


def _generated(path: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    generate_texts(path, prompts=TEXTS, file=None, max_new_tokens=6, sampling=Sampling(), **options)
    return capsys.readouterr().out


def _put_strangers(step_dir: Path) -> None:
    """Put files beside a checkpoint's own that transformers would take up."""
    weights = {
        name: torch.zeros_like(one) for file in step_dir.glob("model-*") for name, one in load_file(file).items()
    }
    save_file(weights, step_dir / "model.safetensors", metadata={"format": "pt"})
    (step_dir / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nowhere"}')
    (step_dir / "added_tokens.json").write_text('{"film": 299}')
    (step_dir / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    (step_dir / "vocab.txt").write_text("a\nfine\nfilm\n")


def test_files_beside_a_checkpoints_own_are_not_used(
    classifier: Path, generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, use in ((classifier, _predicted), (generator, _generated)):
        expected = use(path, capsys)
        copy = Path(shutil.copytree(path, tmp_path / path.parts[-3] / path.name))
        _put_strangers(copy)
        assert use(copy, capsys) == expected
        # A model that is not the listed one is not found either.
        (copy / "config.json").rename(copy / "other.json")
        with pytest.raises(UserError, match=r"config\.json"):
            use(copy, capsys)


def test_the_average_of_the_weights_is_used_if_asked_for(
    classifier: Path, generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average of some weights; the others, which were frozen, are those of the model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for path, auto_class, use in (
        (classifier, AutoModelForSequenceClassification, _predicted),
        (generator, AutoModelForCausalLM, _generated),
    ):
        model = auto_class.from_pretrained(path)
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if "embed" not in name}
        expected = use(path, capsys)
        for name in trained:
            model.get_parameter(name).data.normal_(generator=torch.Generator().manual_seed(0))
        both = _save(tmp_path / path.parts[-3], model, averages=trained)
        assert use(both, capsys) != expected
        assert use(both, capsys, ema=True) == expected
        with pytest.raises(UserError, match="holds no average of the weights"):
            use(path, capsys, ema=True)


def test_names_and_texts_are_printed_on_a_line_without_control_characters(
    classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_texts(classifier, texts=["two\nlines\tand \x1b[31mred"], file=None)
    (line,) = capsys.readouterr().out.splitlines()
    _, probabilities, text = line.split("\t")
    assert "bad\\x1b[31m 0." in probabilities
    assert "good\\nor so 0." in probabilities
    assert text == "two\\nlines\\tand \\x1b[31mred"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "recipe.json"])
def test_a_file_that_says_something_else_is_no_traceback(
    name: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its digest in the manifest, so that only what is in it can be refused."""
    copy = Path(shutil.copytree(classifier, tmp_path / classifier.name))
    data = (copy / name).read_bytes()
    refused = 0
    for number in range(12):
        (copy / name).write_text(json.dumps(change_json(json.loads(data), random.Random(f"{name} {number}"))))
        sign(copy, name)
        try:
            assert len(_predicted(copy, capsys).splitlines()) == len(TEXTS)
        except UserError:
            refused += 1
    assert refused


def test_rows_of_a_table_keep_their_columns(classifier: Path, tmp_path: Path) -> None:
    run = classifier.parents[1] if classifier.name.startswith("step") else classifier
    rows = pd.DataFrame({"number": ["007", "8"], "text": list(TEXTS), "note": ["a, b", "None"]})
    rows.to_csv(tmp_path / "texts.csv", index=False)
    rows.to_json(tmp_path / "texts.jsonl", orient="records", lines=True)
    rows.to_parquet(tmp_path / "texts.parquet")
    options: dict[str, Any] = {"text_column": "", "ema": False}
    for kind in ("csv", "jsonl", "parquet"):
        predict_rows(run, data=str(tmp_path / f"texts.{kind}"), output=tmp_path / f"out.{kind}", **options)
    found = [
        pd.read_csv(tmp_path / "out.csv", dtype={"number": str}, keep_default_na=False),
        pd.read_json(tmp_path / "out.jsonl", lines=True, dtype={"number": str}),
        pd.read_parquet(tmp_path / "out.parquet"),
    ]
    scores = [f"score_{name}" for name in LABELS.values()]
    for table in found:
        assert [*table.columns] == [*rows.columns, "predicted_label", *scores]
        pd.testing.assert_frame_equal(table[[*rows.columns]], rows, check_dtype=False)
        assert table[scores].sum(axis=1).tolist() == pytest.approx([1, 1], abs=1e-6)
        assert table["predicted_label"].tolist() == [
            LABELS[int(row.to_numpy().argmax())] for _, row in table[scores].iterrows()
        ]

    def refused(match: str, data: str = "texts.csv", output: str | None = "new.csv", **changed: Any) -> None:
        out = tmp_path / output if output else None
        with pytest.raises(UserError, match=match):
            predict_rows(run, data=str(tmp_path / data), output=out, **{**options, **changed})

    refused("exists; choose another file", output="out.csv")
    refused("needs --output FILE", output=None)
    refused("must end in .csv, .jsonl, .parquet", output="out.xlsx")
    refused("no column 'words'; it has 'number', 'text', 'note'", text_column="words")
    refused("has a column 'predicted_label' already", data="out.csv")
    assert not (tmp_path / "new.csv").exists()
