"""The model card in a checkpoint's folder: its front matter as hubs read it, its tables, and no private paths."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from shardlaunch import fit
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import open_checkpoint
from shardlaunch.recipes.bert_imdb import BertImdb
from tests.recipes import LinearNet, NetOptions, save_small_bert

SHORT: dict[str, Any] = {"max_steps": 2, "threads_per_rank": 1, "tracker": "none"}


def _card(step_dir: Path | None) -> ModelCard:
    assert step_dir is not None
    return ModelCard.load(step_dir / "README.md")


def test_card_of_a_module(tmp_path: Path) -> None:
    result = fit(LinearNet, output_dir=tmp_path, lr=0.25, eval_every=1, **SHORT)
    card = _card(result.last_checkpoint)
    assert card.data.library_name == "shardlaunch"
    assert card.data.tags == ["shardlaunch", "recipes"]
    assert card.data.metrics == ["accuracy"]
    assert card.data.license is None
    assert card.data.datasets is None
    for text in (
        "# recipes, step 2",
        "A linear classifier on plain data",
        "(class `LinearNet`)",
        "| train | 203 | `",
        "| eval | 61 | `",
        "| `--lr` | `0.25` |",
        "Evaluated at step 2.",
        f"| accuracy | {result.evaluations[-1]['accuracy']:.6g} |",
        'glob("model-*.safetensors")',
        "| torch | ",
    ):
        assert text in card.text, text
    assert str(tmp_path) not in str(card)
    assert result.last_checkpoint is not None
    assert "README.md" in open_checkpoint(result.last_checkpoint, peers=Peers()).manifest.files


def test_its_weights_load_as_the_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fit(LinearNet, output_dir=tmp_path, **SHORT)
    card = _card(result.last_checkpoint)
    assert result.last_checkpoint is not None
    monkeypatch.chdir(result.last_checkpoint)
    names: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    LinearNet(NetOptions()).model().load_state_dict(names["weights"])


def test_card_of_a_transformers_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_small_bert(tmp_path / "bert")
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "".join(f"a film of {n},{'good' if n % 2 else 'bad'}\n" for n in range(40)))
    result = fit(
        BertImdb, output_dir=tmp_path / "run", model=str(tmp_path / "bert"), data=str(texts), max_length=16, **SHORT
    )
    card = _card(result.last_checkpoint)
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None
    assert "Source: `texts.csv`" in card.text
    assert "| `--model` | `bert` |" in card.text
    assert "shardlaunch" in card.data.tags
    assert str(tmp_path) not in str(card)
    assert result.last_checkpoint is not None
    monkeypatch.chdir(result.last_checkpoint)
    names: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    assert type(names["model"]).__name__ == "BertForSequenceClassification"
