"""`shardlaunch predict` of a checkpoint that tags words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.errors import UserError, printable
from shardlaunch.launcher.commands.adapters import model_of
from shardlaunch.launcher.commands.text_models import in_use
from shardlaunch.launcher.toolkit.tags import WordEncoder, entities, split_tag

KIND = "model that tags words"


def print_tags(checkpoint: Checkpoint, tokenizer: Any, texts: Sequence[str], *, ema: bool) -> None:
    """Print each text's entities, or the tag of each word where tags mark none. Words are apart by blanks."""
    from transformers import AutoModelForTokenClassification

    model = model_of(checkpoint, AutoModelForTokenClassification, kind=KIND, ema=ema)
    max_length = checkpoint.recipe.options.get("max_length")
    if not (type(max_length) is int and max_length > 0):
        raise UserError(f"{checkpoint.step_dir}: its recipe.json has the max_length {max_length!r}")
    names = [printable(str(model.config.id2label[number]), is_name=True) for number in range(model.config.num_labels)]
    marks_entities = any(split_tag(name)[1] for name in names)
    with torch.no_grad(), in_use(checkpoint):
        encode = WordEncoder(tokenizer, max_length=max_length)
        for text in texts:
            words = text.split()
            tags = [names[number] for number in _tags(model, encode(words))]
            found = _entities(words, tags) if marks_entities else " ".join(tags)
            print(f"{found}\t{printable(text, is_name=True)}")


def _tags(model: Any, rows: Sequence[tuple[list[int], int, np.ndarray, int]]) -> list[int]:
    found: list[int] = []
    for ids, _, places, _ in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        found += logits[torch.from_numpy(places)].argmax(dim=-1).tolist()
    return found


def _entities(words: Sequence[str], tags: Sequence[str]) -> str:
    """Return the entities in their order, such as `PER: Juliet, LOC: Verona`; - if there are none."""
    found = sorted(entities([split_tag(tag) for tag in tags]), key=lambda entity: entity[1])
    return ", ".join(f"{kind}: {printable(' '.join(words[a : b + 1]), is_name=True)}" for kind, a, b in found) or "-"
