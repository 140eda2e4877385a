"""`ckpt list`, `ckpt verify` and `ckpt show`: look at checkpoints without changing anything."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from shardlaunch.checkpoints.files import is_gone
from shardlaunch.checkpoints.finding import Run, best_step, checkpoint_at, runs_at
from shardlaunch.checkpoints.names import EMA, MANIFEST, MODEL, NUM_BYTES, OPTIMIZER, SECTIONS, step_of_dir_name
from shardlaunch.checkpoints.records import RunRecord, read_record
from shardlaunch.checkpoints.verifying import Damage, ListedCheckpoint, Verdict, look_at, verify
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.output import age, number, print_json, print_table, size, warn
from shardlaunch.launcher.commands.ckpt.run_digests import difference_from_recorded
from shardlaunch.launcher.reporting.tracking import EVAL_PREFIXES, read_metrics

MOST_METRICS = 5  # columns of metrics in a table; --json has all
DAMAGED = 1


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A checkpoint in a list."""

    path: Path
    step: int | None
    num_bytes: int | None = None
    saved_at_s: float | None = None
    is_best: bool = False
    reason: str = ""
    metrics: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self.path),
            "step": self.step,
            "bytes": self.num_bytes,
            "saved_at_s": self.saved_at_s,
            "is_best": self.is_best,
            "is_valid": not self.reason,
            "reason": self.reason,
            "metrics": dict(self.metrics),
        }


def list_checkpoints(path: Path, *, verified: bool, as_json: bool) -> int:
    """Print the checkpoints of a run. Return 1 if one of them is not valid."""
    runs = runs_at(path)
    listed = [(run, _rows(run, verified=verified)) for run in runs]
    if as_json:
        print_json(
            {
                "verified": verified,
                "runs": [
                    {
                        "run": str(run.path),
                        "checkpoints": [row.document() for row in rows],
                        "unfinished": [str(path) for path in run.leftovers()],
                    }
                    for run, rows in listed
                ],
            }
        )
    else:
        for run, rows in listed:
            _print_rows(run, rows, verified=verified)
    return DAMAGED if any(row.reason for _, rows in listed for row in rows) else 0


def _rows(run: Run, *, verified: bool) -> list[_Row]:
    metrics = _metrics(run)
    best = best_step(run)
    rows = []
    for step_dir in run.step_dirs():
        step = step_of_dir_name(step_dir.name)
        try:
            found = look_at(step_dir)
        except UserError as error:
            if step_dir.exists():  # else the run has deleted it just now
                reason = str(error).removeprefix(f"{step_dir}: ").removeprefix(f"{step_dir}/")
                of_step = metrics.get(step, {})
                rows.append(_Row(path=step_dir, step=step, is_best=step == best, reason=reason, metrics=of_step))
            continue
        reason = ""
        if verified:
            verdict = verify(step_dir)
            if verdict.is_gone:
                continue
            reason = "; ".join(f"{one.file}: {one.what}" for one in verdict.damages)
        rows.append(
            _Row(
                path=step_dir,
                step=found.step,
                num_bytes=found.num_bytes,
                saved_at_s=_saved_at(step_dir),
                is_best=found.step == best,
                reason=reason,
                metrics=metrics.get(found.step, {}),
            )
        )
    return rows


def _saved_at(step_dir: Path) -> float | None:
    try:
        return (step_dir / MANIFEST).stat().st_mtime
    except OSError:
        return None


def _metrics(run: Run) -> dict[int | None, dict[str, Any]]:
    """Return what metrics.jsonl has of each step: its loss and its evaluation."""
    by_step: dict[int | None, dict[str, Any]] = {}
    if run.run_dir is not None:
        try:
            for line in read_metrics(run.run_dir, warn=warn):
                of_step = {
                    name: value for name, value in line.items() if name == "loss" or name.startswith(EVAL_PREFIXES)
                }
                by_step.setdefault(line["step"], {}).update(of_step)
        except (UserError, OSError) as error:
            warn(str(error))
    return by_step


def _print_rows(run: Run, rows: list[_Row], *, verified: bool) -> None:
    print(run.path)
    names = list(dict.fromkeys(name for row in rows for name, one in row.metrics.items() if not isinstance(one, list)))
    shown = names[:MOST_METRICS]
    table = [["step", "size", "age", *shown, ""]]
    for row in rows:
        state = row.reason and f"not valid: {row.reason}"
        table.append(
            [
                "?" if row.step is None else f"{row.step:,}",
                "" if row.num_bytes is None else size(row.num_bytes),
                "" if row.saved_at_s is None else age(row.saved_at_s),
                *(number(row.metrics[name]) if name in row.metrics else "" for name in shown),
                "  ".join(part for part in ("best" if row.is_best else "", state) if part),
            ]
        )
    if rows:
        print_table(table, indent="  ", right=range(len(shown) + 3))
        num_valid = sum(not row.reason for row in rows)
        how = "all digests" if verified else "manifest and sizes; --verify checks all digests"
        print(f"  {num_valid} of {len(rows)} valid ({how})")
    else:
        print("  no checkpoints")
    for path in run.leftovers():
        print(f"  {path.name}: not finished: a save or a deletion is under way, or a crash has left it")


def verify_checkpoints(path: Path, *, step: int | None, as_json: bool) -> int:
    """Verify one checkpoint, or all of a run. Return 1 if one of them is damaged."""
    if step is not None:
        step_dirs = [checkpoint_at(path, step=step, warn=warn)]
    else:
        step_dirs = [step_dir for run in runs_at(path) for step_dir in run.step_dirs()]
    if not step_dirs:
        raise UserError(f"{path}: no checkpoint in this folder")
    verdicts = []
    known: dict[Path, Any] = {}
    for step_dir in step_dirs:
        verdict = _with_recorded(verify(step_dir), known)
        verdicts.append(verdict)
        if as_json:
            continue
        if verdict.is_gone:
            print(f"{step_dir}: deleted meanwhile")
        elif verdict.is_valid:
            print(f"{step_dir}: valid, {verdict.num_files} files, {size(verdict.num_bytes)}")
        else:
            print(f"{step_dir}: damaged")
            for damage in verdict.damages:
                print(f"  {damage.file}: {damage.what}")
        if verdict.unlisted:
            print(f"  not of the checkpoint: {', '.join(verdict.unlisted)}")
    if as_json:
        print_json(
            {
                "checkpoints": [
                    {
                        "checkpoint": str(verdict.step_dir),
                        "is_valid": verdict.is_valid,
                        "is_gone": verdict.is_gone,
                        "files": verdict.num_files,
                        "bytes": verdict.num_bytes,
                        "damages": [{"file": one.file, "what": one.what} for one in verdict.damages],
                        "unlisted": list(verdict.unlisted),
                    }
                    for verdict in verdicts
                ]
            }
        )
    return DAMAGED if any(verdict.damages for verdict in verdicts) else 0


def _with_recorded(verdict: Verdict, known: dict[Path, Any]) -> Verdict:
    """Add a damage where a valid checkpoint is not of the state that its run has recorded."""
    try:
        what = difference_from_recorded(verdict.step_dir, known) if verdict.is_valid else ""
    except UserError:
        if not is_gone(verdict.step_dir):
            raise
        return replace(verdict, unlisted=(), is_gone=True)
    return replace(verdict, damages=(Damage(file=MANIFEST, what=what),)) if what else verdict


def show_checkpoint(path: Path, *, step: int | None, as_json: bool) -> int:
    """Print what a checkpoint holds."""
    checkpoint = look_at(checkpoint_at(path, step=step, warn=warn))
    document = _description(checkpoint)
    if as_json:
        print_json(document)
    else:
        _print_description(checkpoint, document)
    return 0


def _description(checkpoint: ListedCheckpoint) -> dict[str, Any]:
    record = checkpoint.record
    recipe = checkpoint.recipe
    (run,) = runs_at(checkpoint.step_dir)
    versions: Mapping[str, str] = {}
    if run.run_dir is not None:
        try:
            versions = read_record(run.run_dir / "run.json", RunRecord).versions
        except UserError as error:
            warn(str(error))
    sections: dict[str, Any] = {}
    for section in SECTIONS:
        tensors = [one for one in record.tensors if one.section == section]
        if section == EMA and not tensors:
            continue
        sections[section] = {
            "tensors": len(tensors),
            "elements": sum(prod(one.shape) for one in tensors),
            "bytes": sum(prod(one.shape) * NUM_BYTES[one.dtype] for one in tensors),
        }
    trained = {one.name for one in record.tensors if one.section == OPTIMIZER}
    weights = [one for one in record.tensors if one.section == MODEL]
    return {
        "checkpoint": str(checkpoint.step_dir),
        "step": checkpoint.step,
        "format_version": record.version,
        "saved_at_s": _saved_at(checkpoint.step_dir),
        "bytes": checkpoint.num_bytes,
        "files": {name: entry.bytes for name, entry in record.files.items()},
        "recipe": recipe.recipe if recipe else None,
        "options": recipe.options if recipe else {},
        "identity": recipe.run.identity if recipe else {},
        "environment": recipe.run.warn if recipe else {},
        "versions": dict(versions),
        "position": msgspec.structs.asdict(checkpoint.position),
        "sections": sections,
        "elements_with_optimizer_state": sum(prod(one.shape) for one in weights if one.name in trained),
        "aliases": record.aliases,
        "tensors": [
            {
                "name": one.name,
                "section": one.section,
                "entry": one.entry,
                "shape": one.shape,
                "dtype": one.dtype,
                "file": one.file,
            }
            for one in record.tensors
        ],
    }


def _print_description(checkpoint: ListedCheckpoint, document: Mapping[str, Any]) -> None:
    position = checkpoint.position
    print(checkpoint.step_dir)
    saved = "" if document["saved_at_s"] is None else f", saved {age(document['saved_at_s'])} ago"
    print(f"  step {checkpoint.step:,} of {document['recipe'] or 'an unknown recipe'}{saved}")
    print(
        f"  {size(checkpoint.num_bytes)} in {len(document['files'])} files, format version {document['format_version']}"
    )
    if position.best_value is not None:
        print(f"  best {position.best_metric} {number(position.best_value)} at step {position.best_step:,}")
    if position.is_finished:
        print("  the run ended here")
    model = document["sections"][MODEL]
    print(
        f"  {model['elements']:,} weights and buffers; "
        f"{document['elements_with_optimizer_state']:,} of them with optimizer state"
    )
    for heading, values in (
        ("position", document["position"]),
        ("options", document["options"]),
        ("environment", {**document["environment"], **document["versions"]}),
    ):
        if values:
            print(f"\n{heading}")
            print_table([[name, _value(one)] for name, one in values.items()], indent="  ")
    for section, facts in document["sections"].items():
        print(f"\n{section}: {facts['tensors']} tensors, {facts['elements']:,} elements, {size(facts['bytes'])}")
        rows = [
            [one["name"], one["entry"], "x".join(map(str, one["shape"])) or "scalar", one["dtype"], one["file"]]
            for one in document["tensors"]
            if one["section"] == section
        ]
        if rows:
            print_table(rows, indent="  ")
    for alias, name in document["aliases"].items():
        print(f"  {alias} is {name}")


def _value(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
