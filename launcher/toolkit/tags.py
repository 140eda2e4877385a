"""Tags of words: their names, their words as tokens, and the entities that they mark."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.notes import current
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.mixture import of_training
from shardlaunch.launcher.toolkit.packing import NO_TARGET
from shardlaunch.launcher.toolkit.pretrained import tokenizer_key

OUTSIDE = "O"
PREFIXES = "BIESLU"
_SAME = {"L": "E", "U": "S"}  # BILOU's names of BIOES's prefixes


def split_tag(tag: str) -> tuple[str, str]:
    """Return prefix (B, I, E, S or O) and type of a tag, such as ("B", "PER"); ("O", "") if it marks no entity."""
    prefix, mark, kind = tag.partition("-")
    if mark and kind and prefix in PREFIXES and len(prefix) == 1:
        return _SAME.get(prefix, prefix), kind
    return OUTSIDE, ""


def entities(tags: Sequence[tuple[str, str]]) -> set[tuple[str, int, int]]:
    """Return the entities of a sentence: (type, first word, last word), of tags as `split_tag` returns them.

    As conlleval and seqeval count them: an entity also begins with an I or E that continues none of its type.
    """
    found = set()
    begin, before, kind_before = 0, OUTSIDE, ""
    for place, (prefix, kind) in enumerate((*tags, (OUTSIDE, ""))):
        is_new = prefix in "BS" or before in "ESO" or kind != kind_before
        if before != OUTSIDE and (is_new or prefix == OUTSIDE):
            found.add((kind_before, begin, place - 1))
        if prefix != OUTSIDE and is_new:
            begin = place
        before, kind_before = prefix, kind
    return found


def numbered_tags(
    splits: Mapping[str, Any], *, source: str, called: Mapping[str, str], names: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return the splits with `words` and `tags` as numbers, and the names of the tags.

    `called` are the columns' names in --data `source`, `names` those of tags that are numbers, by number. The tags are
    those of the column's ClassLabel type, else those of the training data, and B- and I- of each of its types, if it
    has both prefixes. Raises UserError for words without a tag, tags without a name, and unknown ones.
    """
    by_split = {name: _named(split, name, source, called, names) for name, split in splits.items()}
    in_training = {tag for tags, _ in of_training(by_split) for row in tags for tag in row}
    declared: list[str] = next((found for _, found in of_training(by_split) if found), [])
    if declared:
        all_tags = list(declared)
    else:
        seen = {split_tag(tag) for tag in in_training}
        kinds = {kind for prefix, kind in seen if prefix in "BI"}
        both = (
            {f"{prefix}-{kind}" for kind in kinds for prefix in "BI"} if {"B", "I"} <= {p for p, _ in seen} else set()
        )
        all_tags = sorted(in_training | both, key=lambda tag: (tag != OUTSIDE, *reversed(split_tag(tag)), tag))
    if len(all_tags) < 2:
        raise UserError(
            f"--data {source}: all words of the training data have the tag {all_tags[0]!r}; at least two are required"
        )
    places = {tag: number for number, tag in enumerate(all_tags)}
    numbered = {}
    for name, (tags, found) in by_split.items():
        if found and found != declared:
            raise UserError(
                f"--data {source}: the tags differ: {some(found)} in the {name} data, {some(declared or all_tags)} in "
                f"the training data"
            )
        for row, row_tags in enumerate(tags, start=1):
            unknown = [tag for tag in row_tags if tag not in places]
            if unknown:
                raise UserError(
                    f"--data {source}: row {row} of the {name} data has the tag {unknown[0]!r}, which the training "
                    f"data has not; its tags are {some(map(repr, all_tags), 12)}"
                )
        numbered[name] = _with_numbers(splits[name], tags, places, all_tags)
    return numbered, all_tags


def _named(
    split: Any, name: str, source: str, called: Mapping[str, str], names: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """Return each row's tags by name, and the names that the column declares. Raises UserError for what is none."""
    import datasets

    feature = getattr(split.features["tags"], "feature", None)
    where = f"--data {source}: row {{row}} of the {name} data"
    declared: list[str] = []
    kind = str(getattr(feature, "dtype", ""))
    if isinstance(feature, datasets.ClassLabel):
        declared = list(feature.names)
    elif "int" in kind:
        if not names:
            raise UserError(
                f"--data {source}: the tags {called['tags']!r} of the {name} data are numbers without names; give them "
                f"in their order: --tag-names O B-PER I-PER ..."
            )
        declared = list(names)
    elif "string" not in kind:
        raise UserError(
            f"--data {source}: column {called['tags']!r} must hold lists of tags, not {split.features['tags']}"
        )
    if names and (kind == "string" or declared != list(names)):
        raise UserError(f"--tag-names: the tags of the {name} data have names; remove it")
    found = []
    for row, (words, tags) in enumerate(zip(split["words"], split["tags"], strict=True), start=1):
        at = where.format(row=row)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{at}: {called['words']!r} is not a list of words")
        if not isinstance(tags, list) or len(tags) != len(words) or None in tags:
            count = len([tag for tag in tags or () if tag is not None])
            raise UserError(f"{at} has {len(words)} words and {count} tags; each word needs one")
        if declared and not all(0 <= tag < len(declared) for tag in tags):
            raise UserError(f"{at} has the tag {max(tags, key=abs)}; tags are 0 to {len(declared) - 1}")
        found.append([declared[tag] for tag in tags] if declared else tags)
    return found, declared


def _with_numbers(split: Any, tags: list[list[str]], places: Mapping[str, int], all_tags: Sequence[str]) -> Any:
    import datasets

    features = datasets.Features({**split.features, "tags": datasets.List(datasets.Value("int64"))})

    def numbered(rows: list[int]) -> dict[str, Any]:
        return {"tags": [[places[tag] for tag in tags[row]] for row in rows]}

    return derived(
        split,
        lambda _, rows: numbered(rows),
        key=("tag numbers", *all_tags),
        input_columns=["words"],
        with_indices=True,
        features=features,
    )


def tagged_tokens(split: Any, tokenizer: Any, *, name: str, max_length: int) -> Any:
    """Return sentences as `input_ids`, `labels` (the tag at a word's first token, else -100) and `length`.

    A sentence of more than `max_length` tokens is divided between words into several rows, which is said at the start,
    as are words of which the tokenizer makes nothing, that become its unknown token.
    """
    encode = WordEncoder(tokenizer, max_length=max_length)

    others = [column for column in split.column_names if column not in ("words", "tags")]
    names = ("input_ids", "labels", "length", "part", "num_unknown", *others)

    def tokenize(sentences: list[list[str]], tags: list[list[int]], *rest: list[Any]) -> dict[str, Any]:
        columns: dict[str, list[Any]] = {column: [] for column in names}
        for words, of_words, *values in zip(sentences, tags, *rest, strict=True):
            for part, (ids, first, places, num_unknown) in enumerate(encode(words)):
                labels = np.full(len(ids), NO_TARGET)
                labels[places] = of_words[first : first + len(places)]
                row = (ids, labels, len(ids), part, num_unknown, *values)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
        return columns

    found = derived(
        split,
        tokenize,
        key=("tagged", 1, tokenizer_key(tokenizer), max_length),
        doing="tokenizing",
        input_columns=["words", "tags", *others],
        remove_columns=split.column_names,
    )
    parts = np.array(found["part"][:])
    warnings = current().warnings
    if (parts == 1).any():
        warnings.append(
            f"--max-length {max_length}: {(parts == 1).sum():,} of {len(split):,} sentences of the {name} data are "
            f"longer, and divided between words; an entity across a division counts as two"
        )
    num_empty = len(split) - int((parts == 0).sum())
    if num_empty:
        warnings.append(f"{num_empty:,} of {len(split):,} sentences of the {name} data have no words: not used")
    if num_unknown := int(np.sum(found["num_unknown"][:])):
        warnings.append(
            f"the tokenizer makes no token of {num_unknown:,} words of the {name} data; they become "
            f"{tokenizer.unk_token!r}"
        )
    return found.remove_columns(["part", "num_unknown"])


class WordEncoder:
    """Makes rows of tokens of a sentence's words, with the special tokens of the tokenizer around each row."""

    def __init__(self, tokenizer: Any, *, max_length: int) -> None:
        framed = tokenizer(["a"], is_split_into_words=True, return_special_tokens_mask=True)
        is_special = framed["special_tokens_mask"]
        inner = [place for place, special in enumerate(is_special) if not special]
        self._start = framed["input_ids"][: inner[0]]
        self._end = framed["input_ids"][inner[-1] + 1 :]
        self._tokenizer = tokenizer
        self._room = max_length - len(self._start) - len(self._end)

    def __call__(self, words: Sequence[str]) -> list[tuple[list[int], int, np.ndarray, int]]:
        """Return rows: ids, the number of the first word, the place of each word's first token, unknown words.

        A word with more tokens than a row has room for is cut off.
        """
        if not words:
            return []
        encoded = self._tokenizer(list(words), is_split_into_words=True, add_special_tokens=False, verbose=False)
        of_words: list[list[int]] = [[] for _ in words]
        for token, word in zip(encoded["input_ids"], encoded.word_ids(), strict=True):
            of_words[word].append(token)
        rows: list[tuple[list[int], int, list[int], int]] = []
        for number, tokens in enumerate(of_words):
            is_unknown = not tokens
            tokens = (tokens or [self._tokenizer.unk_token_id])[: self._room]
            if not rows or len(rows[-1][0]) - len(self._start) + len(tokens) > self._room:
                rows.append(([*self._start], number, [], 0))
            ids, first, places, num_unknown = rows[-1]
            rows[-1] = ([*ids, *tokens], first, [*places, len(ids)], num_unknown + is_unknown)
        return [([*ids, *self._end], first, np.array(places), num_unknown) for ids, first, places, num_unknown in rows]
