"""`shardlaunch report`: what the page says, that it needs no network, and that nothing overflows."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shardlaunch import UserError
from shardlaunch.launcher.commands.report.charts import MOST_POINTS, short, thinned
from shardlaunch.launcher.commands.report.main import write_report
from shardlaunch.launcher.commands.report.reading import Series, read_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_EMPTY = ("meta", "img", "br", "line", "path", "circle")  # elements without an end


class Page(HTMLParser):
    """A page: its text, what its elements refer to, and whether each of them has its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.references: list[str] = []
        self.titles: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] not in ("style", "script"):
            self.text.append(data)
        if self._open[-1] == "b":
            self.titles.append(data)


def run_of(
    folder: Path, *, steps: int = 8, options: dict[str, Any] | None = None, metric: str = "accuracy", **evaluation: Any
) -> Path:
    """Write the folder of a run: run.json and metrics.jsonl."""
    folder.mkdir(parents=True)
    record = {
        "identity": {"recipe": "mine", "fingerprint of the train data": "0123456789abcdef" * 2},
        "warn": {"device": "cpu"},
        "options": {name: {"value": value, "mark": "identity"} for name, value in (options or {}).items()},
        "ranks": 2,
        "strategy": "ddp",
        "versions": {"torch": "2.13.0"},
        "machine": {"python": "3.11.7"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines: list[dict[str, Any]] = [
        {
            "step": n,
            "epoch": n / 4,
            "loss": 2 / n,
            "lr": 0.1,
            "grad_norm": 1.0,
            "samples": 8,
            "tokens": 0,
            "step_s": 0.01,
        }
        for n in range(1, steps + 1)
    ]
    lines[0] |= {"ranks_data_s": [0.1, 0.2, 0.9], "ranks_forward_s": [0.1, 0.1, 0.1]}
    lines[1] |= {"skipped": True, "loss": "NaN"}
    lines.append({"step": steps, "epoch": steps / 4, "eval/loss": 0.25, f"eval/{metric}": 0.75, **evaluation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Return three runs: with odd names and all that there is, with another metric, and one that a kill has cut."""
    odd = run_of(tmp_path / "a <b> & 'c'", options={"lr": 0.1, "note": "</script><script>alert(1)</script>"}, **{
        "eval/confusion_matrix": [[5, 1], [2, 7]], "eval_ema/accuracy": 0.8,
    })  # fmt: skip
    media = odd / "media" / "step-00000008"
    media.mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(media / "digits.png")
    (media / "notes.txt").write_text("a text of <many> words " * 200)
    (media / "worst.csv").write_text("row,word\n" + "".join(f"{n},word{n}\n" for n in range(40)))
    other = run_of(tmp_path / "other", steps=5_000, options={"lr": 0.2, "note": "", "width": [8, 8]}, metric="f1_macro")
    killed = run_of(tmp_path / "killed", options={"lr": 0.2, "note": ""})
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": "what"}\n{"step": 10, "lo')
    return [odd, other, killed]


def test_what_the_page_says(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(runs, output=tmp_path / "page.html")
    assert "page.html: 3 runs" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    said = " ".join(" ".join(page.text).split())
    for expected in (
        "a <b> & 'c'",
        "not finished: at step 8, no checkpoint",
        "--lr 0.1 0.2 0.2",
        "01234567…",
        "the slowest rank took 900 ms per step for data, the median one 200 ms",
        "1 updates skipped, the first at step 2",
        "1 damaged lines are left out; the first: line 10",
        "the first 2,000 of 4,600 characters",
        "the first 12 of 40 rows",
        "thinned",
        "rows: true, columns: predicted",
    ):
        assert expected in said
    assert page.titles == [
        *("loss", "accuracy", "f1_macro"),
        *("loss", "learning rate", "gradient norm"),
        "step time",
    ]
    assert "alert(1)" in said
    assert text.count("<script>") == 1
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "://" not in text
    assert "default-src 'none'" in text
    assert len(text) < 300_000


def test_refusals(runs: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no metrics yet, so there is nothing to show"):
        write_report([empty], output=None)
    with pytest.raises(UserError, match="neither a run"):
        write_report([tmp_path], output=None)
    with pytest.raises(UserError, match="no such folder"):
        write_report([tmp_path / "gone"], output=None)
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match="exists and is no report"):
        write_report(runs, output=tmp_path / "mine.html")
    assert write_report([runs[1], empty], output=tmp_path / "new.html") == 0
    assert write_report([runs[1]], output=None) == write_report([runs[1]], output=None) == 0  # in place of itself
    assert (runs[1] / "report.html").exists()


def test_folds_are_runs_and_names_tell_runs_apart(tmp_path: Path) -> None:
    for number in (1, 2):
        (run_of(tmp_path / "folds" / f"fold-{number}") / "checkpoints").mkdir()
    one, two = run_of(tmp_path / "x" / "run"), run_of(tmp_path / "y" / "run")
    names = [facts.name for facts in read_runs([tmp_path / "folds", one, two, one])]
    assert names == ["folds/fold-1", "folds/fold-2", "x/run", "y/run"]


def test_a_million_points_are_few_that_keep_their_range() -> None:
    series = Series()
    for step in range(1, 100_001):
        series.add(step, math.inf if step == 7 else 1e3 if step == 77_777 else step / 1e5)
    points = thinned(series)
    assert len(points.steps) == MOST_POINTS
    assert points.is_thinned
    assert max(points.highs) == 1e3
    assert min(points.lows) == 1e-5
    assert points.steps == sorted(points.steps)
    assert [short(value) for value in (0, 0.12345, 1234.5, 12345, 2.5e6, 1e-5)] == [
        *("0", "0.123", "1234", "12.3k", "2.5M", "1.0e-5"),
    ]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_overflows_in_a_browser(runs: list[Path], tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    write_report(runs, output=tmp_path / "page.html")
    probe = """<script>
    const page = document.documentElement, found = page.dataset;
    found.over = page.scrollWidth - page.clientWidth;
    found.wide = [...document.querySelectorAll('svg text')].filter(one => {
      const box = one.getBoundingClientRect(); return box.right > innerWidth || box.left < 0;
    }).length;
    const plot = document.querySelector('.plot'), box = plot.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 9}));
    found.tip = document.querySelector('.tip').textContent;
    found.asked = performance.getEntriesByType('resource').length;
    </script></body>"""
    text = (tmp_path / "page.html").read_text().replace("</body>", probe)
    (tmp_path / "probed.html").write_text(text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run(
        [*command, f"--window-size={width},900", "--dump-dom", (tmp_path / "probed.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=200,
    ).stdout  # fmt: skip
    found = dict(re.findall(r'data-(over|wide|tip|asked)="([^"]*)"', dumped[:2000]))
    assert found["over"] == "0"
    assert found["wide"] == "0"
    assert found["asked"] == "0"
    assert "A  step 8: 0.25" in found["tip"]
