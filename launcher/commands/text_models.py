"""Shared code of the commands for text models: open a checkpoint, its tokenizer and model, and read texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.layout import RECIPE
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, open_path
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.display import Display


def whole_model(folder: Path, auto_class: Any, *, kind: str) -> Any:
    """Load the model of a checkpoint. Raises UserError for missing or unexpected weights, or another kind of model."""
    refusal = f"{folder}: not a checkpoint of a {kind}"
    try:
        model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{refusal} ({' '.join(str(error).split())[:300]})") from error
    misfits = [*info["missing_keys"], *info["unexpected_keys"]]
    if misfits:
        raise UserError(f"{refusal}: missing or unexpected weights: {some(misfits)}")
    return model.eval()


def all_texts(texts: Sequence[str], file: Path | None, *, flag: str) -> list[str]:
    """Return the given texts and those of a file, one per line. Raises UserError when there is none."""
    try:
        lines = file.read_text().split("\n") if file is not None else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {file}: not readable: {error}") from error
    found = [*texts, *(line for line in lines if line.strip())]
    if not found:
        raise UserError(f'no text: give {flag} "..." or --file PATH')
    return found


def open_text_model(path: Path, *, kind: str) -> tuple[Checkpoint, Any]:
    """Return the checkpoint at a path and its tokenizer. Raises UserError when it has none."""
    checkpoint = open_path(path, peers=Peers(), warn=Display(silent=False).warn)
    if not (checkpoint.step_dir / "tokenizer_config.json").exists():
        name = checkpoint.read_json(RECIPE)["recipe"]
        raise UserError(f"{checkpoint.step_dir}: a checkpoint of {name}, which is not a {kind} (it has no tokenizer)")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return checkpoint, AutoTokenizer.from_pretrained(checkpoint.step_dir)
