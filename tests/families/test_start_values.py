"""The start of a sharded run of many families of models: each value by itself, and to the bit as in the whole model.

Among all tests, a family whose experts transformers merges; `make test-families` compares all of them.
"""

import os
from pathlib import Path

import pytest
import torch

from shardlaunch.launcher.toolkit.families import CLASSIFIERS, PACKING_MODELS, ROW_MODELS, TRANSLATORS
from shardlaunch.text import from_config, from_source, pretrained_weights
from tests.families.models import save_model, save_tokenizer
from tests.unit.launcher.runs.test_start_values import checked_values

ALL = bool(os.environ.get("SHARDLAUNCH_ALL_FAMILIES"))
HEADS = {
    "SequenceClassification": CLASSIFIERS,
    "CausalLM": (*PACKING_MODELS, *ROW_MODELS),
    "Seq2SeqLM": TRANSLATORS,
}
FEW = (("SequenceClassification", "mixtral"),)
# Their constructors compute buffers from values of parameters, which sharded strategies refuse.
REFUSED = ("ibert",)


@pytest.mark.parametrize(
    ("head", "family"),
    [(head, name) for head, names in HEADS.items() for name in names if name not in REFUSED] if ALL else FEW,
)
def test_a_family_starts_with_the_same_weights_by_shards(head: str, family: str, tmp_path: Path) -> None:
    """Drawn; pretrained, with a new head where there is one; pretrained in model(), and stored in bf16."""
    import transformers

    auto = getattr(transformers, f"AutoModelFor{head}")
    save_model(tmp_path / "fp32", auto, family, tokenizer=save_tokenizer(tmp_path, kind="plain"))
    auto.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    more = {"num_labels": 5} if head == "SequenceClassification" else {}
    config = from_source(transformers.AutoConfig, tmp_path / "fp32", **more)
    checked_values(lambda: from_config(auto, config, family))
    for stored in ("fp32", "bf16"):
        checked_values(
            lambda: from_config(auto, config, family),
            lambda stored=stored: pretrained_weights(auto, tmp_path / stored, **more),
        )
    checked_values(lambda: auto.from_pretrained(tmp_path / "bf16", ignore_mismatched_sizes=True, **more))
