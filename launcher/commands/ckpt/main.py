"""The words of `shardlaunch ckpt`. Each command imports what it needs: to look at checkpoints needs no torch."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shardlaunch.checkpoints.listing import DamagedCheckpoint
from shardlaunch.checkpoints.records import DamagedRecord
from shardlaunch.errors import UserError

EXIT_DAMAGED = 1

_DESCRIPTION = """Look at checkpoints, compare, convert, copy and delete them. No model is built.

  shardlaunch ckpt list outputs/bert_imdb-demo
  shardlaunch ckpt verify outputs/bert_imdb-demo
  shardlaunch ckpt show outputs/bert_imdb-demo/best
  shardlaunch ckpt diff outputs/one outputs/other --step 500
  shardlaunch ckpt export outputs/bert_imdb-demo/best my-model --dtype bf16
  shardlaunch ckpt average outputs/run/checkpoints/step-0000* mean-model
  shardlaunch ckpt prune outputs/bert_imdb-demo --keep 1 --dry-run
  shardlaunch ckpt copy outputs/bert_imdb-demo s3://bucket/bert_imdb-demo

RUN is an output folder, its folder of checkpoints, or a cross-validation with fold-N folders. Where one checkpoint is
wanted, a run stands for its newest valid one; --step N chooses another one, and RUN/best the best one.

Exit status: 0 fine, 1 something is damaged or differs, 2 the command cannot be carried out (one message on stderr).
"""
_OnePath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|CHECKPOINT")]
_RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
_Json = Annotated[bool, tyro.conf.arg(name="json")]
_Dtype = Literal["bf16", "fp16", "fp32"]


def ckpt_command(argv: Sequence[str]) -> int:
    """Run `shardlaunch ckpt` with its words and return the exit status."""
    commands: dict[str, Callable[..., int]] = {
        "list": _list,
        "verify": _verify,
        "show": _show,
        "diff": _diff,
        "export": _export,
        "average": _average,
        "prune": _prune,
        "copy": _copy,
    }
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="shardlaunch ckpt",
            description=_DESCRIPTION,
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (DamagedCheckpoint, DamagedRecord) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DAMAGED
    except BrokenPipeError:  # of a reader that has seen enough
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    return status


def _list(run: _RunPath, verify: bool = False, as_json: _Json = False) -> int:
    """List the checkpoints of a run: step, size, age, metrics of that step, which is the best, which are damaged.

    The exit status is 1 when one of them is damaged.

    Args:
        run: A run's output folder, its folder of checkpoints, a cross-validation, or one checkpoint.
        verify: Read all files and compare their digests; without it, manifest and sizes are checked.
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.looking import list_checkpoints

    return list_checkpoints(run, verified=verify, as_json=as_json)


def _verify(path: _OnePath, step: int | None = None, as_json: _Json = False) -> int:
    """Check every file of a checkpoint, or of all checkpoints of a run, and say which is damaged and how.

    A checkpoint whose digests are not those that its run has recorded of its step (--digest-every) counts as damaged.
    The exit status is 1 when one of them is damaged.

    Args:
        path: A checkpoint, or a run (all of its checkpoints).
        step: Verify this checkpoint of a run only.
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.looking import verify_checkpoints

    return verify_checkpoints(path, step=step, as_json=as_json)


def _show(path: _OnePath, step: int | None = None, as_json: _Json = False) -> int:
    """Show what a checkpoint holds: recipe, options, position, versions, and its tensors with shapes and dtypes.

    Args:
        path: A checkpoint, or a run (its newest valid checkpoint).
        step: Show this checkpoint of a run.
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.looking import show_checkpoint

    return show_checkpoint(path, step=step, as_json=as_json)


def _diff(
    one: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")],
    other: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")],
    step: int | None = None,
    weights_only: bool = False,
    as_json: _Json = False,
) -> int:
    """Compare two checkpoints: position, options, and all tensors, those with the largest differences first.

    The exit status is 1 when they differ in a tensor, in the position or in the identity of the run. Other options,
    such as the output folder or the number of steps between saves, are shown and do not count. Where both runs have
    recorded digests of their steps (--digest-every), the first step at which they differ is shown, and does not count.

    Args:
        one: A checkpoint, or a run (its newest valid checkpoint).
        other: The checkpoint or run to compare it with.
        step: Compare this checkpoint of both runs.
        weights_only: Compare weights and buffers only.
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.diff import diff_checkpoints

    return diff_checkpoints(one, other, step=step, weights_only=weights_only, as_json=as_json)


def _export(
    path: _OnePath,
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    step: int | None = None,
    dtype: _Dtype | None = None,
    shard_size: str = "",
    merge: bool = False,
    ema: bool = False,
    as_json: _Json = False,
) -> int:
    """Write the weights of a checkpoint, with its configuration, tokenizer and model card, as a model folder.

    `AutoModel.from_pretrained(OUT)` loads it, where the model is one of transformers. The exit status is 1 when the
    checkpoint is damaged.

    Args:
        path: A checkpoint, or a run (its newest valid checkpoint).
        out: The folder to write: a new one, or an empty one.
        step: Export this checkpoint of a run.
        dtype: Dtype of the floating-point weights (default: as saved). Refused if a value would become infinite.
        shard_size: Largest size of a file, such as 5GB or 500MB (default: all in one file).
        merge: Merge the LoRA adapter into its base model, which is loaded as a whole for a run with --lora-rank.
        ema: Export the average of the weights that the run keeps (--ema, --ema-half-life, --swa-from).
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.exporting import export

    return export(path, out, step=step, dtype=dtype, shard_size=shard_size, merge=merge, ema=ema, as_json=as_json)


def _average(
    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="CHECKPOINT... OUT")],
    weights: tuple[float, ...] = (),
    dtype: _Dtype | None = None,
    shard_size: str = "",
    as_json: _Json = False,
) -> int:
    """Write the mean of the weights of several checkpoints of one model as a model folder, as `export` does.

    Sums are in float64. Integer buffers are those of the last checkpoint; that is said where they differ.

    Args:
        paths: The checkpoints, and last the folder to write.
        weights: What each checkpoint counts, such as 1 2 1 (default: all the same).
        dtype: Dtype of the floating-point weights (default: as saved). Refused if a value would become infinite.
        shard_size: Largest size of a file, such as 5GB or 500MB (default: all in one file).
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.exporting import average

    return average(paths, weights=weights, dtype=dtype, shard_size=shard_size, as_json=as_json)


def _prune(run: _RunPath, keep: int, dry_run: bool = False, as_json: _Json = False) -> int:
    """Delete the older checkpoints of a run, never its best one, and what crashes have left.

    The checkpoints that are kept are verified first. Damaged ones do not count, and stay. Refused while the run goes
    on. The exit status is 1 when one is damaged.

    Args:
        run: A run's output folder, its folder of checkpoints, or a cross-validation (each of its folds).
        keep: Newest valid checkpoints to keep, besides the best one.
        dry_run: Only say what would be deleted.
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.changing import prune

    return prune(run, keep=keep, dry_run=dry_run, as_json=as_json)


def _copy(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CHECKPOINT|URL")],
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")],
    step: int | None = None,
    as_json: _Json = False,
) -> int:
    """Copy a checkpoint or a run to another folder or to a URL, or back, and verify it there by reading it back.

    A URL is whatever fsspec knows: a path, file://, s3://, gs://, sftp:// (some need a package). A repeated copy skips
    what is there and right. The exit status is 1 when a checkpoint of a run is damaged; the others are copied.

    Args:
        source: What to copy.
        target: The run's new folder, or the checkpoint's.
        step: Copy this checkpoint of a run only.
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.ckpt.changing import copy

    return copy(source, target, step=step, as_json=as_json)
