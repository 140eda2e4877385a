"""Folders as sentence-transformers has them: an encoder, and what makes an embedding of the states of its tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.notes import current

MODULES = "modules.json"
ABOUT = "config_sentence_transformers.json"
_POOLING_DIR = "1_Pooling"
_MODES = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Kinds of pooling, with the names that all versions of sentence-transformers read."""


def save_embedder(folder: Path, model: Any, *, pooling: str, max_length: int, prompts: Mapping[str, str]) -> None:
    """Write what `SentenceTransformer(folder)` needs besides model and tokenizer: vectors of length 1 by `pooling`.

    `pooling` is `mean` or `cls`, `max_length` the number of tokens that a text is cut off at. `prompts` are the texts
    in front of a `query` and of a `document`; of empty ones nothing is written.
    """
    kinds = {"": "Transformer", _POOLING_DIR: "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    _write(folder / MODULES, modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    dim = {"word_embedding_dimension": model.config.hidden_size}
    (folder / _POOLING_DIR).mkdir(exist_ok=True)
    _write(folder / _POOLING_DIR / "config.json", dim | {key: mode == pooling for mode, key in _MODES.items()})
    given = {name: text for name, text in prompts.items() if text}
    _write(folder / ABOUT, {"prompts": given, "default_prompt_name": None, "similarity_fn_name": "cosine"})


def check_embedder(source: str | Path, pooling: str, *, is_chosen: bool, prompts: Mapping[str, str]) -> None:
    """Compare what a model folder or hub id says of its embeddings, if it does, with what the recipe makes of it.

    Raises UserError for modules that would be left out, and for another pooling unless this one `is_chosen`; then warns
    of it, and of the model's own prompts if `prompts` are all empty.
    """
    modules = _read(source, MODULES)
    if modules is None:
        return
    called = f"--model {source}"
    try:
        kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
        config = _read(source, f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else None
        about = _read(source, ABOUT) or {}
        own_prompts = {name: text for name, text in (about.get("prompts") or {}).items() if text}
        modes = _modes(config) if config is not None else []
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{called}: {MODULES} and what it names are not as sentence-transformers writes them"
        ) from error
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others or not modes:
        raise UserError(
            f"{called}: makes its embeddings with {some(others or ['no pooling'])}, which this recipe would leave out; "
            f"choose another --model, or a copy of the folder without {MODULES} to train its encoder alone"
        )
    if config is not None and not config.get("include_prompt", True) and any(prompts.values()):
        raise UserError(
            f"{called}: leaves prefixes out of its embeddings (include_prompt), which this recipe does not; remove "
            f"--anchor-prefix and --positive-prefix, or choose another --model"
        )
    if modes != [pooling]:
        if not is_chosen:
            use = f"set --pooling {modes[0]}" if modes in (["mean"], ["cls"]) else "choose another --model"
            raise UserError(
                f"{called}: its embeddings are made by {some(modes)} pooling; {use}, or set --pooling {pooling} to "
                f"train it with that"
            )
        current().warnings.append(f"{called}: its embeddings are made by {some(modes)} pooling, here by {pooling}")
    if own_prompts and not any(prompts.values()):
        texts = ", ".join(f"{name}: {text!r}" for name, text in own_prompts.items())
        current().warnings.append(
            f"{called}: has prompts, of which none is used ({texts}); --anchor-prefix and --positive-prefix set them"
        )


def _modes(config: Mapping[str, Any]) -> list[str]:
    """Return the kinds of pooling of a module's configuration, of any version."""
    if found := config.get("pooling_mode"):
        return [found] if isinstance(found, str) else list(found)
    return [mode for mode, key in _MODES.items() if config.get(key)] or ["mean"]


def _read(source: str | Path, name: str) -> Any:
    """Return a JSON file of a model folder or hub id, None if it has none. Raises UserError for one that is no JSON."""
    from transformers.utils import cached_file

    path = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        return None if path is None else json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--model {source}: {name} cannot be read ({error})") from error


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
