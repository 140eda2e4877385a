"""What a run's start says about its data, noted where it is read, by code that is not told which run it is for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np

from shardlaunch.errors import some

MOST_EXAMPLES = 3
LONGEST_EXAMPLE = 100  # characters


@dataclass
class Notes:
    """Lines about the data, for the table of a run's start, and warnings."""

    data: list[str] = field(default_factory=list)
    """What was read, and what lies there and was not."""
    splits: dict[str, str] = field(default_factory=dict)
    """Where each split comes from."""
    columns: str = ""
    examples: Sequence[str] = ()
    remarks: list[str] = field(default_factory=list)
    """What was converted on the way."""
    warnings: list[str] = field(default_factory=list)

    def rows(
        self, classes: Mapping[str, np.ndarray], class_names: Sequence[str], *, fold: tuple[int, int] | None = None
    ) -> dict[str, str]:
        """Return the lines by name, at most eleven: of files, splits, columns, classes and examples.

        `classes` has the class of each row by split, as the run or fold has it; `fold` is (number, number of folds).
        """
        rows = {}
        if self.data:
            rows["data"] = "; ".join(self.data)
        for name, text in self.splits.items():
            if fold is None:
                rows[name] = text
            elif name == "train":
                rows[name] = f"{text}; without fold {fold[0]} of {fold[1]}, which is the eval data"
            else:
                rows["unused"] = f"{text}: not used with --folds"
        if self.columns:
            rows["columns"] = self.columns
        if self.remarks:
            rows["converted"] = "; ".join(self.remarks)
        if classes and class_names:
            num_classes = len(class_names)
            counts = [
                np.bincount(numbers[(numbers >= 0) & (numbers < num_classes)].astype(np.int64), minlength=num_classes)
                for numbers in classes.values()
            ]
            by_class = (
                f"{name if name == name.strip() else repr(name)} {'/'.join(f'{count[number]:,}' for count in counts)}"
                for number, name in enumerate(class_names)
            )
            rows[f"classes ({'/'.join(classes)})"] = some(by_class)
        for number, text in enumerate(self.examples):
            rows[f"example {number + 1}"] = text
        return rows


_CURRENT: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def collected() -> Iterator[Notes]:
    """Collect the notes of the run that reads its data here."""
    notes = Notes()
    token = _CURRENT.set(notes)
    try:
        yield notes
    finally:
        _CURRENT.reset(token)


def current() -> Notes:
    """Return the notes of the run that reads its data here; outside of a run, notes that nobody reads."""
    return _CURRENT.get() or Notes()


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, in the plural where it is not 1."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def excerpt(value: object, length: int = LONGEST_EXAMPLE) -> str:
    """Return a value as a short text in one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else f"{text[: length - 2].rstrip()} …"
