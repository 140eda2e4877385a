"""`ckpt diff`: how two checkpoints differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from shardlaunch.checkpoints.comparing import Comparison, compare
from shardlaunch.checkpoints.finding import checkpoint_at, runs_at
from shardlaunch.checkpoints.names import SECTIONS
from shardlaunch.checkpoints.verifying import look_at
from shardlaunch.errors import some
from shardlaunch.launcher.commands.ckpt.output import number, print_json, print_table, warn
from shardlaunch.launcher.commands.ckpt.run_digests import are_exact, compare_runs

MOST_TENSORS = 20  # rows of a table; --json has all
DIFFERENT = 1


def diff_checkpoints(one: Path, other: Path, *, step: int | None, weights_only: bool, as_json: bool) -> int:
    """Print how two checkpoints differ. Return 1 if they do."""
    step_dirs = [checkpoint_at(path, warn=warn, step=_step_for(path, step)) for path in (one, other)]
    checkpoints = [look_at(step_dir) for step_dir in step_dirs]
    comparison = compare(*checkpoints, weights_only=weights_only)
    runs = compare_runs(*step_dirs)
    if as_json:
        document = {"one": str(step_dirs[0]), "other": str(step_dirs[1]), **_document(comparison)}
        print_json({**document, "runs": runs.document() if runs is not None else None})
    else:
        print(f"A {step_dirs[0]}\nB {step_dirs[1]}")
        if runs is not None:
            print(f"\nruns: {runs.describe(is_exact=are_exact(*checkpoints))}")
        _print(comparison)
    return 0 if comparison.is_same else DIFFERENT


def _step_for(path: Path, step: int | None) -> int | None:
    """Return the step to take of a run at a path: none where the path is a checkpoint already."""
    return None if step is None or any(run.only is not None for run in runs_at(path)) else step


def _document(comparison: Comparison) -> dict[str, Any]:
    return {
        "is_same": comparison.is_same,
        "position": _pairs(comparison.position),
        "identity": _pairs(comparison.identity),
        "other_options": _pairs(comparison.other_options),
        "only_in_one": list(comparison.only_in_one),
        "only_in_other": list(comparison.only_in_other),
        "other_form": [msgspec.to_builtins(form) for form in comparison.other_form],
        "tensors": [msgspec.to_builtins(tensor) for tensor in comparison.tensors],
        "num_equal": comparison.num_equal,
    }


def _pairs(differing: Mapping[str, tuple[Any, Any]]) -> dict[str, list[Any]]:
    return {name: list(pair) for name, pair in differing.items()}


def _print(comparison: Comparison) -> None:
    for heading, pairs in (
        ("position", comparison.position),
        ("options of the run's identity", comparison.identity),
        ("other options and environment, which do not count", comparison.other_options),
    ):
        if pairs:
            print(f"\n{heading}")
            rows = [["", "A", "B"], *([name, _short(one), _short(other)] for name, (one, other) in pairs.items())]
            print_table(rows, indent="  ")
    for side, keys in (("A", comparison.only_in_one), ("B", comparison.only_in_other)):
        if keys:
            print(f"\n{len(keys)} tensors only in {side}: {some(keys)}")
    if comparison.other_form:
        print("\ntensors of another shape or dtype")
        rows = [["", "A", "B"], *([form.key, form.one, form.other] for form in comparison.other_form)]
        print_table(rows, indent="  ")
    for section in SECTIONS:
        differing = [it for it in comparison.tensors if it.section == section]
        if not differing:
            continue
        print(f"\n{section}: {len(differing)} tensors differ")
        rows = [["", "elements", "of", "largest", "relative"]]
        rows += [
            [
                it.key,
                f"{it.num_differing:,}",
                f"{it.num_elements:,}",
                f"{it.largest_absolute:.3g}",
                f"{it.largest_relative:.3g}",
            ]
            for it in differing[:MOST_TENSORS]
        ]
        print_table(rows, indent="  ", right=(1, 2, 3, 4))
        if len(differing) > MOST_TENSORS:
            print(f"  and {len(differing) - MOST_TENSORS} more (--json shows all)")
    num_tensors = comparison.num_equal + len(comparison.tensors)
    print(f"\n{comparison.num_equal} of {num_tensors} tensors that both have are equal")
    print("the same" if comparison.is_same else "different")


def _short(value: Any) -> str:
    text = number(value) if value is not None else ""
    return text if len(text) <= 40 else f"{text[:37]}..."
