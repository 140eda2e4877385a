"""Shared code of the commands for text models: open a checkpoint, its tokenizer and model, and read texts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from shardlaunch.checkpoints.exporting import weights_of, write_model_folder
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, open_path
from shardlaunch.checkpoints.state import EMA, OPTIMIZER
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.display import Display


@contextmanager
def listed_files(checkpoint: Checkpoint, *, ema: bool = False) -> Iterator[Path]:
    """Make a folder of links to the files that the manifest lists, without those of optimizer and average.

    With `ema` it has the averages in place of the weights, written anew.
    transformers takes what it finds in a folder: a model.safetensors, an adapter or a tokenizer that somebody has put
    beside a checkpoint's own files would be loaded too, or instead.
    """
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="shardlaunch-")))
            if ema:
                folder /= "average"
                write_model_folder(folder, weights_of(checkpoint, is_average=True), beside=checkpoint)
            for file in () if ema else checkpoint.manifest.files:
                if not file.startswith((f"{OPTIMIZER}-", f"{EMA}-")):
                    (folder / file).parent.mkdir(exist_ok=True)
                    (folder / file).symlink_to((checkpoint.step_dir / file).absolute())
        except OSError as error:
            raise UserError(f"no folder for temporary files: {error}; set TMPDIR to a writable one") from error
        yield folder


@contextmanager
def in_use(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise UserError where a checkpoint's model or tokenizer, which has been loaded, cannot do its work."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # sizes that do not fit each other, a token that is not there: each has its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{checkpoint.step_dir}: its model and tokenizer do not fit each other ({reason})") from error


def loaded(checkpoint: Checkpoint, auto_class: Any, *, kind: str, ema: bool = False, **options: Any) -> Any:
    """Return `auto_class.from_pretrained` of a checkpoint's own files. Raises UserError for another kind of model."""
    with listed_files(checkpoint, ema=ema) as folder:
        try:
            return auto_class.from_pretrained(folder, **options)
        except Exception as error:  # transformers raises anything for a configuration that it does not understand
            reason = " ".join(str(error).replace(str(folder), str(checkpoint.step_dir)).split())[:300]
            raise UserError(
                f"{checkpoint.step_dir}: not a checkpoint of a {kind} ({reason or type(error).__name__})"
            ) from error


def whole_model(checkpoint: Checkpoint, auto_class: Any, *, kind: str, ema: bool = False) -> Any:
    """Load the model of a checkpoint, with `ema` with the average of its weights.

    Raises UserError for missing or unexpected weights, or another kind of model."""
    model, info = loaded(checkpoint, auto_class, kind=kind, ema=ema, dtype=torch.float32, output_loading_info=True)
    misfits = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if misfits:
        raise UserError(
            f"{checkpoint.step_dir}: not a checkpoint of a {kind}: missing or unexpected weights: {some(misfits)}"
        )
    return model.eval()


def all_texts(texts: Sequence[str], file: Path | None, *, flag: str) -> list[str]:
    """Return the given texts and those of a file, one per line. Raises UserError when there is none."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8-sig").split("\n") if file is not None else []
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # the last of a `~` without a home
        raise UserError(f"--file {file}: not readable: {error}") from error
    found = [*texts, *(line for line in lines if line.strip())]
    if not found:
        raise UserError(f'no text: give {flag} "..." or --file PATH')
    return found


def open_text_model(path: Path, *, kind: str) -> tuple[Checkpoint, Any]:
    """Return the checkpoint at a path and its tokenizer. Raises UserError when it has none."""
    checkpoint = open_path(path.expanduser(), peers=Peers(), warn=Display(silent=False).warn)
    if "tokenizer_config.json" not in checkpoint.manifest.files:
        name = checkpoint.recipe.recipe
        raise UserError(f"{checkpoint.step_dir}: a checkpoint of {name}, which is not a {kind} (it has no tokenizer)")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return checkpoint, loaded(checkpoint, AutoTokenizer, kind=kind)
