"""Times as people write them."""

import pytest

from shardlaunch.errors import UserError
from shardlaunch.launcher.durations import duration_text, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90m", 5400),
        ("1h30m", 5400),
        ("2d", 172800),
        ("1d6h", 108000),
        ("45s", 45),
        ("36:00:00", 129600),
        ("1-12:00:00", 129600),
        ("0:05:00", 300),
    ],
)
def test_seconds(text: str, seconds: int) -> None:
    assert seconds_of(text, "--max-time") == seconds


@pytest.mark.parametrize("text", ["90", "1.5h", "h", "0s", "0:00:00", "30m1h", "1:90:00", "12:30", "-5m", "soon", "٣m"])
def test_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--mtbf .*: write a time with its units"):
        seconds_of(text, "--mtbf")


def test_texts() -> None:
    assert [duration_text(seconds) for seconds in (0.123, 3, 45.3, 119, 130, 5400, 7200, 90000)] == [
        *("0.12 s", "3 s", "45 s", "119 s", "2.2 min", "90 min", "2 h", "25 h")
    ]
