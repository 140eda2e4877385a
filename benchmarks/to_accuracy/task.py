"""The task that all tools train: MiniLM, to say whether a film review is good; what is written down in one place.

The folder that the first argument names holds `train.parquet` and `test.parquet` with columns text and label. A tool
prints one line of JSON: the seconds from before its first step to after its last, and the accuracy on the test data.
"""

import json
import sys
from pathlib import Path
from typing import Any

from shardlaunch import demo

LENGTH = int(sys.argv[2])
DATA = Path(sys.argv[1])
SEED = int(sys.argv[3])
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, WARMUP = 1e-4, 0.01, 1.0, 0.1
BATCH_SIZE, RANKS = 16, 2
NAMES = ("negative", "positive")


def tokenizer() -> Any:
    """Return the tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.bert_dir())


def rows(split: str) -> Any:
    """Return tokenized reviews: the columns input_ids, attention_mask and labels."""
    import datasets

    table = datasets.Dataset.from_parquet(str(DATA / f"{split}.parquet"))
    tokens = tokenizer()

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokens(batch["text"], truncation=True, max_length=LENGTH)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    return table.map(tokenize, batched=True, remove_columns=["text"]).rename_column("label", "labels")


def model() -> Any:
    """Return the model, with a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(demo.bert_dir(), num_labels=len(NAMES))


def loop_parts() -> tuple[Any, Any, Any, Any]:
    """Return what a loop written by hand needs: model, optimizer, and loaders of training and test data."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(tokenizer())
    new = model()
    torch.manual_seed(SEED)
    loader = DataLoader(rows("train"), BATCH_SIZE // RANKS, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(rows("test"), 32, collate_fn=collate)
    return new, torch.optim.AdamW(new.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY), loader, test_loader


def schedule_of(optimizer: Any, num_steps: int) -> Any:
    """Return the schedule of the learning rate."""
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, int(WARMUP * num_steps), num_steps)


def tell(training_s: float, accuracy: float) -> None:
    """Print what came out."""
    print(json.dumps({"training_s": training_s, "accuracy": accuracy}), flush=True)
