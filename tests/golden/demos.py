"""The first steps of every recipe's demo: what is run to record their losses, and to compare with the record."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.distributed.ranks import run_on_ranks
from tests.recipes import losses, recipe_class, run_well

RECIPES = (
    *("mnist_mlp", "cifar_cnn", "vgg16_transfer", "image_classifier"),
    *("bert_imdb", "bert_tagger", "bert_qa", "bert_mlm", "gpt_lm", "translate_seq2seq"),
)
LEFT_OUT = ("dpo_lm", "embed_pairs", "audio_classifier")
"""The demo of the first needs a model that another run has made, and that of the second takes a minute and a half; that
of the third makes more of rounding within its first steps than the bound allows, and each processor rounds otherwise.
"""
NUM_STEPS = 10
# The schedule is the demo's own: the run stops early, it is not made shorter.
ARGV = (
    *("--preset", "demo", "--stop-at-step", str(NUM_STEPS), "--log-every", "1", "--save-every", "0"),
    *("--tracker", "none", "--precision", "fp32", "--threads-per-rank", "1"),
)
RECORD = Path(__file__).with_name("losses.json")
COMMAND = "python -m tests.golden"
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "pillow")


def demo_losses(recipe: str, output_dir: Path) -> list[float]:
    """Return the losses of a demo's first steps, on one rank of the CPU with one thread."""
    run_on_ranks(1, _run, recipe, output_dir)
    by_step = losses(output_dir)
    assert list(by_step) == list(range(1, NUM_STEPS + 1))
    return list(by_step.values())


def _run(recipe: str, output_dir: Path) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    run_well(recipe_class(recipe), [*ARGV, "--output-dir", str(output_dir)])


def versions() -> dict[str, str]:
    """Return what the last digits of a loss may depend on besides the code."""
    return {"CPU": torch.backends.cpu.get_cpu_capability(), **{name: version(name) for name in _PACKAGES}}


def recorded() -> dict[str, Any]:
    """Return the record: `command`, `options` and `versions` that made it, and `losses` by recipe and step."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record
