"""Fill the docs with tables of benchmarks/results/*.json and cells of notebooks: python benchmarks/tables.py [--check].

A page says between two comments what stands there, and this command fills it in:

    <!-- table: KIND RESULT RESULT ... -->
    <!-- end of table -->

Kinds: `runs` (a row per result), `commands` (the command of each run), `benchmark` (a column per result), `memory`
(peaks of host memory), `start` (those while a run starts, before a change and now), `plan` (planning batches),
`plan_memory` (planned memory beside published), `scale` (planning saves), `startup` (starts, by number of ranks),
those of speed_tables.py, `streaming` (loading block by block), `lora` (beside full fine-tuning), `exact` (steps with
exact sums), `ema` (averages of weights), `survival` (how many faults went well), `faults`
(what became of each), `machine` (where the figures were measured).
`<!-- cell: NOTEBOOK NUMBER -->` and `<!-- end of cell -->` stand around a cell of a notebook in docs/, counted from 0.
The plots of plots.py are written too. `--check` writes nothing and fails when a page or a plot differs from its
sources.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import speed_tables
from ema_table import titles_and_rows
from lora_beside_full import table as lora_table
from plots import all_plots
from record import RESULTS
from record import markdown_table as _table
from streaming import table as streaming_table
from survival import judging

DOCS = RESULTS.parents[1] / "docs"
WIDEST_LINE = 80  # of a command, so that it need not be scrolled
Result = dict[str, Any]

_FILLED = re.compile(r"(<!-- (table|cell): ([^>]*?) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
_METRICS: dict[str, Callable[[float], str]] = {
    "accuracy": lambda value: f"accuracy {100 * value:.1f} %",
    "bits_per_byte": lambda value: f"{value:.2f} bits per byte",
    "loss": lambda value: f"{value:.3f} nats per character",
    "bleu": lambda value: f"BLEU {value:.1f}",
    "chrf": lambda value: f"chrF {value:.1f}",
    "f1": lambda value: f"F1 {100 * value:.1f} %",
    "f1_micro": lambda value: f"F1 micro {100 * value:.1f} %",
    "f1_macro": lambda value: f"F1 macro {100 * value:.1f} %",
    "precision": lambda value: f"precision {100 * value:.1f} %",
    "recall": lambda value: f"recall {100 * value:.1f} %",
    "exact_match": lambda value: f"exact match {100 * value:.1f} %",
    "recall_1": lambda value: f"recall@1 {100 * value:.1f} %",
    "ndcg_10": lambda value: f"nDCG@10 {value:.3f}",
    "perplexity": lambda value: f"perplexity {value:.1f}",
}
_ROWS = {  # what a page calls the rows of a benchmark
    "raw": "raw write and fsync, or read, of the same bytes",
    "ours": "shardlaunch, digests included",
    "ours, written by": "shardlaunch, written by",
    "accelerate": "accelerate `save_state`, `load_state` (several ranks: DDP, rank 0 writes)",
    "torch.save": "`torch.save`, one file per rank",
    "torch.distributed.checkpoint": "`torch.distributed.checkpoint`",
    "raw loop, DDP, loss over all ranks": "raw loop, DDP, that logs the loss over all ranks",
    "ours, hooks do nothing": "shardlaunch, nothing logged",
    "ours, metrics.jsonl": "shardlaunch, metrics.jsonl",
    "ours, metrics.jsonl and TensorBoard": "shardlaunch, metrics.jsonl and TensorBoard, the default",
    "ours, hooks do nothing: over DDP": "difference to the raw DDP loop, nothing logged",
    "ours, metrics.jsonl: over DDP": "difference to the raw DDP loop, metrics.jsonl",
    "ours, metrics.jsonl and TensorBoard: over DDP": "difference to the raw DDP loop, the default",
}


def main() -> None:
    """Fill in the tables of all pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page differs")
    is_check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        filled = _FILLED.sub(_filled, text)
        if filled != text:
            stale.append(page)
            if not is_check:
                page.write_text(filled)
    for plot, drawn in all_plots().items():
        if not plot.exists() or plot.read_text() != drawn:
            stale.append(plot)
            if not is_check:
                plot.parent.mkdir(exist_ok=True)
                plot.write_text(drawn)
    names = ", ".join(str(page.relative_to(DOCS.parent)) for page in stale)
    if stale and is_check:
        sys.exit(f"tables or cells differ from their sources in {names}: run python benchmarks/tables.py")
    print(f"written: {names}" if stale else "all tables and cells are as their sources have them")


def _filled(match: re.Match[str]) -> str:
    kind, *names = match[3].split()
    if match[2] == "cell":
        content = _cell(kind, *map(int, names))
    else:
        content = _KINDS[kind]([json.loads((RESULTS / f"{name}.json").read_text()) for name in names])
    return f"{match[1]}\n{content}\n\n{match[4]}"


def _cell(notebook: str, number: int) -> str:
    cell = json.loads((DOCS / notebook).read_text())["cells"][number]
    source = "".join(cell["source"])
    return f"```python\n{source}\n```" if cell["cell_type"] == "code" else source


def _runs(results: Sequence[Result]) -> str:
    rows = [
        (
            result["what"],
            ", ".join(_METRICS[name](result["evaluations"][-1][f"eval/{name}"]) for name in result["headline"]),
            f"{result['num_steps']:,}",
            _seconds(result),
            str(result["ranks"]),
            result["precision"],
        )
        for result in results
    ]
    return _table(("what", "result", "steps", "seconds of steps", "ranks", "precision"), rows)


def _seconds(result: Result) -> str:
    seconds = f"{result['training_s']:.0f}"
    if "after" not in result:
        return seconds
    before = json.loads((RESULTS / f"{result['after']}.json").read_text())
    return f"{before['training_s']:.0f} + {seconds}"


def _commands(results: Sequence[Result]) -> str:
    blocks = [f"# {result['what']}\n{_wrapped(result['command'])}" for result in results]
    return "\n".join(["```sh", "\n\n".join(blocks), "```"])


def _wrapped(command: str) -> str:
    """Return a shell command on lines that a page has room for, broken before options."""
    first, *options = re.split(r" (?=-)", command)
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) < WIDEST_LINE:
            lines[-1] += f" {option}"
        else:
            lines.append(f"    {option}")
    return " \\\n".join(lines)


def _benchmark(results: Sequence[Result]) -> str:
    has_ratio = any("x_raw" in row for row in results[0]["rows"])
    ranks = [f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}" for result in results]
    ratio = results[0].get("ratio", "x raw")
    titles = [title for text in ranks for title in ((text, ratio) if has_ratio else (text,))]
    names = dict.fromkeys(row["name"] for result in results for row in result["rows"])
    # A row that only some of the results have stands behind the one that it follows there.
    longest = max(results, key=lambda result: len(result["rows"]))
    order = [row["name"] for row in longest["rows"]]
    rows = []
    for name in sorted(names, key=lambda name: order.index(name) if name in order else len(order)):
        cells = [_label(name)]
        for result in results:
            row = next((row for row in result["rows"] if row["name"] == name), None)
            cells.append(_range(row) if row else "")
            if has_ratio:
                cells.append(_number(row["x_raw"]) if row else "")
        rows.append(tuple(cells))
    unit, rounds = results[0]["unit"], results[0]["rounds"]
    return _table((f"{unit}, median [least, most] of {rounds} rounds", *titles), rows)


def _label(name: str) -> str:
    """Return what a page calls a row, whose name may begin with the work that is measured and end with a number."""
    is_of_work = name.startswith(("save: ", "load: "))
    work, mark, arm = name.partition(": ") if is_of_work else ("", "", name)
    written = re.fullmatch(r"(ours, written by) (.*)", arm)
    return f"{work}{mark}{f'{_ROWS[written[1]]} {written[2]}' if written else _ROWS.get(arm, arm)}"


def _range(row: Result) -> str:
    """Return median, least and most, which a narrow page may not break apart."""
    text = f"{_number(row['median'])} [{_number(row['least'])}, {_number(row['most'])}]"
    return text.replace(" ", "&nbsp;")


def _number(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _memory(results: Sequence[Result]) -> str:
    keys = ("holds", "save", "load")
    rows = [
        (_label(name), *(f"{figures[key] / 1e6:.0f}" if key in figures else "" for key in keys))
        for result in results
        for name, figures in result["memory_bytes"].items()
    ]
    return _table(("MB of host memory per rank", "held", "more in a save", "more in a load"), rows)


def _survival(results: Sequence[Result]) -> str:
    return "\n\n".join(_table(titles, rows) for titles, *rows in map(judging.count_table, results))


def _faults(results: Sequence[Result]) -> str:
    return "\n\n".join(_table(titles, rows) for titles, *rows in map(judging.fault_table, results))


def _start(results: Sequence[Result]) -> str:
    rows = []
    for row in (row for result in results for row in result["rows"]):
        cells = []
        for arm in ("before", "after"):
            cells += [f"{row[arm] / 1e6:.0f}", f"{row[arm] / row['least']:.2f}"] if arm in row else ["", ""]
        figures = (row["least"], row["held"])
        rows.append((row["name"], str(row["ranks"]), *(f"{figure / 1e6:.0f}" for figure in figures), *cells))
    titles = ("shard + module", "held", "peak before", "x", "peak now", "x")
    return _table(("MB of host memory per rank", "ranks", *titles), rows)


def _plan(results: Sequence[Result]) -> str:
    titles = ("order", "samples", "lengths", "digest, ms", "first step, ms", "a step, µs", "memory, MB")
    rows = [
        (
            row["when"],
            f"{row['num_samples']:,}",
            "yes" if row["has_lengths"] else "no",
            f"{row['digest_s'] * 1e3:,.1f}",
            f"{row['first_s'] * 1e3:,.1f}",
            f"{row['step_s'] * 1e6:,.0f}",
            f"{row['memory_bytes'] / 1e6:,.1f}",
        )
        for result in results
        for row in result["rows"]
    ]
    return _table(titles, rows)


def _plan_memory(results: Sequence[Result]) -> str:
    titles = ("run", "published, GiB", "computed, GiB", "error", "not counted")
    rows = [row for result in results for row in result["rows"]]
    errors = sorted(abs(row["error"]) for row in rows)
    middle = (errors[len(errors) // 2] + errors[(len(errors) - 1) // 2]) / 2
    shown = [
        (
            row["name"],
            f"{row['published_gib']:.1f}",
            f"{row['computed_gib']:.1f}",
            f"{100 * row['error']:+.1f} %",
            row["not_counted"],
        )
        for row in rows
    ]
    left_out = [f"- {name}: {why}" for result in results for name, why in result["omitted"].items()]
    summary = f"Error: median {100 * middle:.1f} %, worst {100 * errors[-1]:.1f} %. Not computed:"
    return "\n\n".join((_table(titles, shown), summary, "\n".join(left_out)))


def _scale(results: Sequence[Result]) -> str:
    titles = (
        "state",
        "layout",
        "ranks",
        "plan, s",
        "memory, MB",
        "sent, MB",
        "manifest, s",
        "largest share, MB",
        "mean",
    )
    rows = [
        (
            row["model"],
            row["layout"],
            f"{row['ranks']:,}",
            f"{row['plan_s']:.3f}",
            f"{row['memory_bytes'] / 1e6:.1f}",
            f"{row['sent_bytes'] / 1e6:.2f}",
            f"{row['manifest_s']:.2f}",
            f"{row['largest_share_bytes'] / 1e6:,.0f}",
            f"{row['mean_share_bytes'] / 1e6:,.0f}",
        )
        for result in results
        for row in result["rows"]
    ]
    return _table(titles, rows)


def _startup(results: Sequence[Result]) -> str:
    rows = [
        (
            row["strategy"],
            row["arm"],
            str(row["ranks"]),
            f"{row['descriptors']:.0f}",
            f"{row['most_descriptors_of_others']:.0f}",
            f"{row['descriptors_of_first']:.0f}",
            f"{row['cpu_s']:.2f}",
            f"{row['wall_s']:.1f}",
        )
        for result in results
        for row in result["rows"]
    ]
    titles = ("descriptors, mean", "most, but rank 0", "rank 0", "CPU per rank, s", "all ranks, s")
    return _table(("strategy", "connections", "ranks", *titles), rows)


def _exact(results: Sequence[Result]) -> str:
    rows = [
        (
            str(result["ranks"]),
            row["arm"],
            "{:.0f} ({:.0f} to {:.0f})".format(*row["step_ms"]),
            "{:.2f} ({:.2f} to {:.2f})".format(*row["over_plain"]),
            str(row["bytes_per_parameter_sent"]) if result["ranks"] > 1 else "",
            str(row["bytes_per_parameter_of_gradients"]),
        )
        for result in results
        for row in result["arms"]
    ]
    bytes_ = ("bytes of a gradient between ranks", "bytes of a gradient in memory")
    return _table(("ranks", "strategy", "step, ms", "x plain", *bytes_), rows)


def _curves(results: Sequence[Result]) -> str:
    names = {"training_loss": "training loss", "evaluation_loss": "evaluation loss"}
    rows = [
        (
            row["task"],
            names.get(what, what),
            *(f"{row[what][mode]:.4f}" for mode in ("plain", "exact")),
            f"{row[what]['noise']:.4f}",
            f"{row[what]['difference']:.5f}",
        )
        for result in results
        for row in result["rows"]
        for what in row
        if isinstance(row[what], dict)
    ]
    return _table(("data", "", "without", "with `--exact`", "noise of seeds", "largest difference of a seed"), rows)


def _machine(results: Sequence[Result]) -> str:
    machines = {f"{result['machine']['cpu']}, Python {result['machine']['python']}" for result in results}
    packages = ("torch", "accelerate", "transformers", "lightning") if "torch" in results[0]["versions"] else ("numpy",)
    found = {
        f"{package} {result['versions'][package]}"
        for package in packages
        for result in results
        if package in result["versions"]
    }
    notes = [f"{result.get('what') or _title(result)}: {result['note']}" for result in results if result["note"]]
    lines = [f"Machine: {'; '.join(sorted(machines))}; {', '.join(sorted(found))}."]
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def _title(result: Result) -> str:
    on = f" on {result['ranks']} rank{'s' * (result['ranks'] > 1)}" if "ranks" in result else ""
    return f"{result['benchmark']}{on}"


_KINDS = {
    "runs": _runs,
    "commands": _commands,
    "benchmark": _benchmark,
    "memory": _memory,
    "survival": _survival,
    "faults": _faults,
    "start": _start,
    "plan": _plan,
    "plan_memory": _plan_memory,
    "scale": _scale,
    "startup": _startup,
    **speed_tables.KINDS,
    "lora": lora_table,
    "streaming": streaming_table,
    "exact": _exact,
    "curves": _curves,
    "ema": lambda results: _table(*titles_and_rows(results)),
    "machine": _machine,
}


if __name__ == "__main__":
    main()
