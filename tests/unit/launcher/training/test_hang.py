"""Which rank is named, when none is, and which is said to be slow."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardlaunch.launcher.training import watchdog as module
from shardlaunch.launcher.training.hang import Seen, behind, hung
from shardlaunch.launcher.training.slow_ranks import EVERY, PartTimes, slowest, spread
from shardlaunch.launcher.training.watchdog import BUSY_FIRST_TIMES, FIRST_TIMES, LONGEST_TIMES, Watchdog
from shardlaunch.progress import FORWARD, PARTS, Progress
from shardlaunch.sharding.heartbeats import Beat
from shardlaunch.sharding.world import World

AFTER_S = 10.0


def beat(marks: int, age_s: float = 20.0, *, groups: dict[str, int] | None = None, **others: bool) -> Beat:
    return Beat(num_marks=marks, age_s=age_s, limit_s=AFTER_S, collectives=groups or {}, **others)


def named(*beats: Beat, silence_s: dict[int, float] | None = None) -> list[int]:
    ranks = {rank: Seen(each, (silence_s or {}).get(rank, 0.0)) for rank, each in enumerate(beats)}
    return hung(ranks, silent_after_s=2.0)


def test_the_rank_that_is_behind() -> None:
    assert named(beat(7), beat(5), beat(7)) == [1]
    assert named(beat(7), beat(7, groups={"0": 3}), beat(7, groups={"0": 4})) == [1]
    assert named(beat(7, groups={"0": 3}), beat(7, groups={"0": 3})) == [0, 1]


def test_ranks_that_wait_are_never_named_while_the_one_they_wait_for_goes_on() -> None:
    """As while rank 0 reads data for hours."""
    assert named(beat(5, age_s=1.0), beat(6, age_s=1e6), beat(6, age_s=1e6)) == []
    assert named(beat(5, age_s=20.0), beat(6, age_s=1e6), beat(6, age_s=1e6)) == [0]


def test_a_rank_that_waits_in_one_group_and_is_awaited_in_another() -> None:
    """As under hsdp: 3 is late, 2 waits for it and so keeps 0 waiting in their group."""
    beats = [
        beat(7, groups={"even": 2}),
        beat(7, groups={"odd": 2}),
        beat(7, groups={"even": 1, "last": 5}),
        beat(7, groups={"odd": 1, "last": 4}),
    ]
    assert behind(dict(enumerate(beats))) == [3]


def test_a_silent_rank_is_named_once_its_limit_is_over_wherever_it_was() -> None:
    assert named(beat(7), beat(9, age_s=0.0), silence_s={1: 8.0}) == []
    assert named(beat(7), beat(9, age_s=0.0), silence_s={1: 11.0}) == [1]


def test_a_rank_that_is_debugged_holds_all_limits() -> None:
    assert named(beat(7), beat(5, is_debugged=True)) == []


def test_a_rank_that_has_done_its_work_is_not_waited_for() -> None:
    assert named(beat(5, has_left=True), beat(7, age_s=1.0)) == []
    assert named(beat(5, has_left=True), beat(7)) == [1]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Progress:
    progress = Progress()
    monkeypatch.setattr(module, "progress", progress)
    return progress


@pytest.fixture
def watchdog(now: Progress, tmp_path: Path) -> Iterator[Watchdog]:
    """Return the watchdog of a run of one rank, which a test makes look."""
    watchdog = Watchdog(World(), after_s=AFTER_S, hangs_dir=tmp_path)
    yield watchdog
    watchdog.close()


def hangs_after(watchdog: Watchdog, *, look_s: float = 1.0) -> float:
    """Return the time without progress after which a hang is found."""
    for number in range(1, 1000):
        watchdog.look(look_s)
        if watchdog.find_hang() is not None:
            return number * look_s
    return float("inf")


def test_the_time_is_measured(watchdog: Watchdog, now: Progress) -> None:
    """What is not known yet has more time than what is; what took long may take long again."""
    assert hangs_after(watchdog) == pytest.approx(FIRST_TIMES * AFTER_S, abs=2)
    now.begin(FORWARD)
    for kind in ("other", FORWARD) * 3:
        watchdog.look(0.1)
        now.begin(kind)
    watchdog.look(0.1)
    for _ in range(80):
        watchdog.look(0.1)
    assert watchdog.find_hang() is None  # after 8 s, where it had taken a moment
    for kind in ("other", FORWARD):
        now.begin(kind)
        watchdog.look(0.1)
    assert hangs_after(watchdog) == pytest.approx(LONGEST_TIMES * 8, abs=2)


def test_signs_of_life(watchdog: Watchdog, now: Progress) -> None:
    """Rows that a phase counts, collectives that begin and samples that are loaded are progress."""
    now.enter("tokenizing")
    for sign in (now.advance, now.mark, lambda: now.begin("other")):
        for _ in range(100):
            watchdog.look(AFTER_S / 2)
            assert watchdog.find_hang() is None
            sign()


def test_a_loading_process_is_alive_while_it_goes_from_sample_to_sample(watchdog: Watchdog, now: Progress) -> None:
    notes = torch.zeros(1, 4, dtype=torch.int64)
    now.workers = notes.numpy()
    now.begin("data")
    now.begin("other")
    now.begin("data")
    for _ in range(100):
        notes[0, 2] += 1
        watchdog.look(AFTER_S / 2)
        assert watchdog.find_hang() is None
    assert hangs_after(watchdog) < 4 * AFTER_S


def test_a_phase_that_reads_is_alive(watchdog: Watchdog, now: Progress, tmp_path: Path) -> None:
    """As one that downloads, or reads a checkpoint of a terabyte."""
    now.enter("loading")
    (tmp_path / "large").write_bytes(bytes(4 << 20))
    for _ in range(30):
        (tmp_path / "large").read_bytes()
        watchdog.look(AFTER_S / 2)
        assert watchdog.find_hang() is None
    assert hangs_after(watchdog) <= BUSY_FIRST_TIMES * AFTER_S + 2


def test_a_debugger_holds_all_limits(watchdog: Watchdog, now: Progress) -> None:
    """The main thread stands in a function of pdb."""
    waiting, go_on = threading.Event(), threading.Event()
    names = {"__name__": "pdb", "waiting": waiting, "go_on": go_on}
    exec("def interaction():\n    waiting.set()\n    go_on.wait()", names)
    thread = threading.Thread(target=names["interaction"])  # type: ignore[arg-type]
    thread.start()
    waiting.wait()
    watchdog.main_thread = thread.ident
    assert hangs_after(watchdog) == float("inf")
    go_on.set()
    thread.join()
    assert hangs_after(watchdog) < float("inf")


def test_time_in_which_the_process_did_not_run_is_not_counted(
    watchdog: Watchdog, now: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler stops a job for the night, a laptop is closed."""
    now.begin(FORWARD)
    clock = iter([0.0, 1.0, 1e5, 1e5 + 1.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    ran = [watchdog.ran_s() for _ in range(4)][1:]
    assert ran[0] == 1.0
    assert ran[1] == 2.0
    assert ran[2] == 1.0


def test_times_of_the_parts_of_steps_are_exchanged_every_100_steps() -> None:
    source = Progress()
    everyone = []
    for rank in (0, 1):
        times = PartTimes(World(rank=rank, size=2), source)
        assert times.of_all(0) == []
        source.seconds = {part: source.seconds[part] + 99 * (rank + 1) for part in PARTS}
        everyone.append(times.of_all(EVERY - 1))
        assert times.of_all(EVERY) == []
    by_part = times.by_part([sum(both) for both in zip(*everyone, strict=True)])
    assert by_part == {part: [1.0, 2.0] for part in PARTS}
    assert spread(by_part)["ranks_data_s"] == [1.0, 1.5, 2.0]
    assert PartTimes(World()).of_all(EVERY - 1) == []


def test_a_rank_is_said_to_be_slow_only_if_it_clearly_is() -> None:
    alike = {
        "data": [0.1, 0.11, 0.1],
        "forward": [1.0, 1.1, 1.0],
        "backward": [2.0, 2.1, 2.0],
        "waiting": [0.3, 0.0, 0.3],
    }
    assert slowest(alike, is_sharded=False) == ""
    late = {**alike, "forward": [1.0, 1.0, 3.0], "waiting": [2.3, 2.3, 0.3]}
    assert slowest(late, is_sharded=False).startswith("rank 2 is slower than the others: 3 s per step for forward")
    assert slowest(late, is_sharded=True) == ""  # there, a rank that waits in its forward pass looks the same
    reading = {**alike, "data": [0.1, 5.0, 0.1]}
    assert slowest(reading, is_sharded=True).startswith("rank 1 is slower than the others: 5 s per step for data")
    short = {**alike, "data": [0.01, 0.02, 0.01]}  # twice as slow, in next to nothing
    assert slowest(short, is_sharded=True) == ""
