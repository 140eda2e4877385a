"""`shardlaunch push`: a run's model, or an exported one, as a repository of a model hub."""

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from shardlaunch.checkpoints.exporting import CONFIG
from shardlaunch.checkpoints.names import ADAPTER_CONFIG, CHECKPOINTS, MANIFEST
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.exporting import export
from shardlaunch.launcher.commands.ckpt.output import size

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", ADAPTER_CONFIG)
"""Files of an earlier model that readers would take in place of the new ones."""


def push_model(
    path: Path,
    repository: str,
    *,
    public: bool,
    revision: str,
    message: str,
    step: int | None,
    ema: bool,
    merge: bool,
) -> int:
    """Upload the model of a run or checkpoint, or a folder that an export has written, to a model hub.

    In one commit, in which weights of an earlier model are deleted. Raises UserError where that does not work.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    path = path.expanduser()
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push: {repository!r} is no name of a repository: {error}") from error
    if "/" not in repository:
        raise UserError(f"push: {repository!r} names no owner; give OWNER/{repository}")
    with TemporaryDirectory(prefix="shardlaunch-") as scratch, _errors_of_hub(repository):
        folder = _exported_folder(path)
        if folder is None:
            folder = Path(scratch, "model")
            with contextlib.redirect_stdout(io.StringIO()):
                export(path, folder, step=step, dtype=None, shard_size="", merge=merge, ema=ema, as_json=False)
        elif step is not None or ema or merge:
            raise UserError(f"push: {path} is an exported model; --step, --ema and --merge are for runs")
        files = [file for file in folder.rglob("*") if file.is_file()]
        api = HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message or f"Model of {path.resolve().name}",
            revision=revision or None,
            delete_patterns=list(_WEIGHTS),
        )
        num_bytes = sum(file.stat().st_size for file in files)
        print(f"{commit.commit_url}: {len(files)} files, {size(num_bytes)}")
        if "license:" not in _head_of_card(folder):
            print("  its model card names no license; add one before others use the model")
    return 0


def _exported_folder(path: Path) -> Path | None:
    """Return a folder that holds a model and no run or checkpoint, None for others."""
    if not path.is_dir() or any((path / name).exists() for name in (MANIFEST, CHECKPOINTS)):
        return None
    is_model = any((path / name).exists() for name in (CONFIG, ADAPTER_CONFIG)) or any(path.glob("*.safetensors"))
    return path if is_model else None


def _head_of_card(folder: Path) -> str:
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.exists() else ""
    return text.split("---")[1] if text.startswith("---") else ""


@contextmanager
def _errors_of_hub(repository: str) -> Iterator[None]:
    """Raise what the hub and the way there have to say as one message."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx, of whichever version huggingface_hub has
    where = f"push: {repository} at {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set; unset it to push") from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        is_forbidden = status in (None, 401, 403)
        advice = " Log in with `hf auth login`, or set HF_TOKEN to a token that may write there" * is_forbidden
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        raise UserError(f"{where}: {reason}.{advice}") from error
    except (transport_error, OSError) as error:
        raise UserError(f"{where}: cannot be reached or read: {error}") from error
