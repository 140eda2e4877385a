"""Tables for the docs, of the benchmarks of speed whose results have shapes of their own."""

from collections.abc import Sequence
from typing import Any

from record import markdown_table

_RANGE = "{{:.{0}f}} ({{:.{0}f}} to {{:.{0}f}})"


def attention(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per length: milliseconds of a step in each arm."""
    arms = list(results[0]["rows"][0]["ms"])
    rows = [
        [
            str(row["length"]),
            *(_shown(row["ms"][arm], digits=0) for arm in arms),
            _shown(row["gain"], digits=2),
        ]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(["tokens", *(f"{arm}, ms" for arm in arms), "plain / ours"], rows)


def comm_volume(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per strategy, ranks and micro-batches: megabytes sent per step, and those of the theory."""
    rows = [
        [
            f"`{row['strategy']}`",
            f"{row['ranks']} x {row['micro_batches']}",
            f"{row['mb']:.2f}",
            f"{row['theory_mb']:.2f}",
            f"{row['ratio']:.4f}",
        ]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(
        ["strategy", "ranks x micro-batches", "sent per step, MB", "theory, MB", "sent / theory"], rows
    )


def starts(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per arm: seconds to the first step and of CPU time, also as ratios to the Trainer's."""
    columns = {"first_step_s": 1, "first_step_over_trainer": 2, "cpu_s": 1, "cpu_over_trainer": 2}
    rows = [
        [row["arm"], *(_shown(row[name], digits=digits) for name, digits in columns.items())]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(["", "first step, s", "x Trainer", "CPU of the whole command, s", "x Trainer"], rows)


def equal_work(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per number of tokens and ranks: the work of the slowest rank in each arm."""
    arms = list(results[0]["rows"][0]["work"])
    rows = [
        [
            str(row["tokens"]),
            f"{row['ranks']} x {row['micro_batches'] // row['ranks']}",
            *(f"{row['work'][arm]:.2f}" for arm in arms),
        ]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(["tokens, at most", "ranks x micro-batches", *arms], rows)


def times_to_accuracy(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per length and arm: seconds, as ratios to this project's, and the accuracy."""
    rows = [
        [
            str(row["length"]),
            row["arm"],
            _shown(row["training_s"], digits=1),
            _shown(row["times_ours"], digits=2),
            _shown(row["accuracy"], digits=3) + (" (void)" if row["is_void"] else ""),
        ]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(["tokens, at most", "", "training, s", "x shardlaunch", "accuracy"], rows)


def head_loss(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per size: memory and CPU time in each arm, and their ratios."""
    arms = list(results[0]["rows"][0]["mb"])
    rows = [
        [
            f"{row['vocabulary']:,}, {row['width']:,}, {row['tokens']:,}",
            *(_shown(row["mb"][arm], digits=0) for arm in arms),
            _shown(row["memory"], digits=2),
            _shown(row["time"], digits=2),
        ]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(["vocabulary, width, tokens", *(f"{arm}, MB" for arm in arms), "memory", "CPU time"], rows)


def evaluation(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per length and arm: reviews per second, and times as ratios to this project's."""
    rows = [
        [str(row["length"]), row["arm"], _shown(row["reviews_per_s"], digits=1), _shown(row["times_ours"], digits=2)]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(["tokens, at most", "", "reviews/s", "time, x shardlaunch"], rows)


def lm_tokens_per_s(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per arm: tokens per second, and as a ratio to the loop written by hand."""
    rows = [
        [row["arm"], _shown(row["tokens_per_s"], digits=0), _shown(row["over_loop"], digits=2)]
        for result in results
        for row in result["rows"]
    ]
    return markdown_table(["", "tokens/s", "/ loop by hand"], rows)


def digest(results: Sequence[dict[str, Any]]) -> str:
    """Return a row per arm: milliseconds of a step, and of the digests of its states."""
    rows = [
        (
            str(result["ranks"]),
            row["arm"],
            _shown(row["step_cpu_ms"], digits=0),
            _shown(row["digest_cpu_ms"], digits=0),
        )
        for result in results
        for row in result["arms"]
    ]
    return markdown_table(
        ("ranks", "strategy", "step, ms of CPU time", "digests of weights and optimizer, ms of CPU time"), rows
    )


def _shown(figures: Sequence[float], *, digits: int) -> str:
    """Return median, least and most."""
    return _RANGE.format(digits).format(*figures)


KINDS = {
    "attention": attention,
    "comm_volume": comm_volume,
    "digest": digest,
    "equal_work": equal_work,
    "evaluation": evaluation,
    "head_loss": head_loss,
    "lm_tokens_per_s": lm_tokens_per_s,
    "starts": starts,
    "times_to_accuracy": times_to_accuracy,
}
