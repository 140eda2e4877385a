"""The model card of a checkpoint: its README.md, as model hubs show it."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.names import BASE
from shardlaunch.checkpoints.records import BaseRecord, read_record
from shardlaunch.launcher.options import Options, flag
from shardlaunch.launcher.recipe import Recipe, recipe_name
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIX, EVAL_PREFIXES
from shardlaunch.launcher.runs.identity import Identity, as_json, versions

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# They say where and how a run goes, not what it is.
_ABOUT_THE_LAUNCH = (
    *("output_dir", "run_name", "project", "tracker", "track_every", "log_every", "config", "resume", "stop_at_step"),
    *("keep", "save_every", "save_to", "num_workers", "debug"),
)
_LOAD_WEIGHTS = """from pathlib import Path
from safetensors.torch import load_file

weights = {}
for file in sorted(Path(".").glob("model-*.safetensors")):
    weights |= load_file(file)"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a run knows that a model card says, besides its recipe."""

    step: int
    identity: Identity
    num_samples: Mapping[str, int]
    """Of each data set."""
    evaluation: Mapping[str, Any]
    """Line of the newest evaluation in metrics.jsonl, empty before the first."""


def model_card(recipe: Recipe, folder: Path, facts: CardFacts) -> str:
    """Return the text of a checkpoint's model card. `folder` holds what the recipe has exported."""
    from huggingface_hub import ModelCardData

    recipe_type, options = type(recipe), recipe.options
    name = recipe_name(recipe_type)
    architecture = _architecture(folder)
    results = _results(facts.evaluation)
    base_model = _hub_id(getattr(options, "model", ""))
    dataset = _hub_id(options.data)
    data = ModelCardData(
        library_name="transformers" if architecture else "shardlaunch",
        tags=["shardlaunch", name],
        base_model=base_model or None,
        datasets=[dataset] if dataset else None,
        metrics=[metric for metric in results if metric != "loss"] or None,
    )
    about = "" if inspect.getdoc(recipe_type) == inspect.getdoc(Recipe) else inspect.getdoc(recipe_type) or ""
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}, step {facts.step:,}\n",
        *([about.splitlines()[0] + "\n"] if about else []),
        f"Trained with the recipe `{name}` (class `{recipe_type.__name__}`) of shardlaunch, to step {facts.step:,}.\n",
        "## Data\n",
        _table(("split", "samples", "fingerprint"), _data_rows(facts), before=f"Source: {_source(options)}.\n\n"),
        "## Options that differ from the defaults\n",
        _table(("option", "value"), _option_rows(options)),
    ]
    if results:
        where = f"Evaluated at step {facts.evaluation['step']:,}.\n\n"
        rows = [(metric, f"{value:.6g}") for metric, value in results.items()]
        parts += ["## Metrics\n", _table(("metric", "value"), rows, before=where)]
    parts += ["## How to load\n", _loading(recipe, folder, architecture)]
    parts += ["## Versions\n", _table(("package", "version"), list(versions().items()))]
    return "\n".join(parts)


def _results(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the results of an evaluation that are one number, by the metrics' names; those of the average begin so."""
    return {
        name.removeprefix(EVAL_PREFIX): value
        for name, value in evaluation.items()
        if name.startswith(EVAL_PREFIXES) and not isinstance(value, list)
    }


def _architecture(folder: Path) -> str:
    """Return the class of transformers that config.json names, empty where there is none."""
    path = folder / "config.json"
    architectures = json.loads(path.read_text()).get("architectures") if path.exists() else None
    return architectures[0] if architectures else ""


def _data_rows(facts: CardFacts) -> list[tuple[str, str, str]]:
    fingerprints = facts.identity.identity
    return [
        (split, f"{count:,}", f"`{fingerprints[f'fingerprint of the {split} data']}`")
        for split, count in facts.num_samples.items()
    ]


def _source(options: Options) -> str:
    return f"`{_public(options.data)}`" if options.data else "the recipe's own"


def _option_rows(options: Options) -> list[tuple[str, str]]:
    rows = []
    for f in fields(options):
        value = getattr(options, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value != default and f.name not in _ABOUT_THE_LAUNCH:
            values = as_json(value)
            shown = " ".join(str(_public(one)) for one in (values if isinstance(values, list) else [values]))
            rows.append((f"`{flag(f.name)}`", f"`{shown}`"))
    return rows


def _public(value: Any) -> Any:
    """Return a value without the folders of a local path in it."""
    if not isinstance(value, str) or _hub_id(value):
        return value
    is_path = value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())
    return Path(value).name if is_path else value


def _hub_id(value: str) -> str:
    """Return a name of the form OWNER/NAME that is no local path, else an empty text."""
    return value if _HUB_ID.fullmatch(value) and not Path(value).expanduser().exists() else ""


def _loading_code(architecture: str, base_model: str = "") -> str:
    """Return Python code that loads a model of transformers in its folder, or the adapter there of a base model."""
    if not base_model:
        return f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained(".")'
    return (
        f"from peft import PeftModel\nfrom transformers import AutoConfig, {architecture}\n\n"
        f'config = AutoConfig.from_pretrained(".")\n'
        f'base = {architecture}.from_pretrained("{base_model}", config=config)\n'
        f'model = PeftModel.from_pretrained(base, ".")'
    )


def _loading(recipe: Recipe, folder: Path, architecture: str) -> str:
    blocks = []
    if architecture:
        base = read_record(folder / BASE, BaseRecord).model if (folder / BASE).exists() else ""
        code = _loading_code(architecture, str(_public(base)) if base else "")
        blocks.append(f"In this folder:\n\n```python\n{code}\n```\n")
    else:
        blocks.append(
            f"In this folder, the weights by the model's parameter names:\n\n```python\n{_LOAD_WEIGHTS}\n```\n"
        )
    usage = recipe.usage(Path("."))
    if usage:
        blocks.append(f"To use it:\n\n```sh\n{usage}\n```\n")
    blocks.append("To start another run from these weights, give this folder to the recipe's `--init-from`.\n")
    blocks.append("The files `optimizer-*.safetensors` and `trainer_state.json` serve only to resume the run.\n")
    return "\n".join(blocks)


def _table(titles: tuple[str, ...], rows: list[Any], *, before: str = "") -> str:
    if not rows:
        return f"{before}None.\n"
    lines = [titles, ("---",) * len(titles), *rows]
    return before + "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
