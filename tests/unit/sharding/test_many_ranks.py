"""What a rank asks of the store, and takes of the system, when there are many ranks."""

import resource

import pytest
from torch.distributed import HashStore

from shardlaunch.errors import UserError
from shardlaunch.launcher.training.watchdog import Watchdog
from shardlaunch.sharding import meeting
from shardlaunch.sharding.heartbeats import Beat, Heartbeats
from shardlaunch.sharding.world import World

MANY = World(rank=9, size=100, local_ranks=range(8, 16), store=None)


def exchanging(number: int, store: HashStore, heartbeats: Heartbeats) -> None:
    """Let all other ranks say something, and this one exchange."""
    for rank in range(MANY.size):
        store.set(f"shardlaunch/beat/{rank}", f'{{"number": {number}}}')
    heartbeats._exchange(store)


def test_beats_of_all_are_read_when_this_rank_looks() -> None:
    store, heartbeats = HashStore(), Heartbeats(MANY, Beat, interval_s=1.0)
    for number in range(3):
        exchanging(number, store, heartbeats)
        assert heartbeats.others.keys() == {0, 8, *range(10, 16)}
        assert {beat.number for beat in heartbeats.others.values()} == {0}
    heartbeats.is_looking = True
    exchanging(3, store, heartbeats)
    assert heartbeats.others.keys() == set(range(100)) - {9}
    assert {beat.number for beat in heartbeats.others.values()} == {3}


def test_ranks_are_not_silent_while_nobody_listens(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Their beats are as old as the last look; it may have been hours ago."""
    watchdog = Watchdog(MANY, after_s=10.0, hangs_dir=tmp_path_factory.getbasetemp())
    store, heartbeats = HashStore(), watchdog._heartbeats
    exchanging(0, store, heartbeats)
    for number in range(1, 100):
        watchdog._age_s = 0.0
        watchdog._note_others(10.0)
        exchanging(number, store, heartbeats)
    assert {seen.silence_s for seen in watchdog._others.values()} == {0.0}
    watchdog._age_s = 9.0  # it looks
    watchdog._note_others(10.0)
    assert {seen.silence_s for seen in watchdog._others.values()} == {0.0}
    exchanging(100, store, heartbeats)
    watchdog._note_others(10.0)
    for _ in range(3):  # and now they say nothing
        heartbeats.num_answers += 1
        watchdog._note_others(10.0)
    assert {seen.silence_s for seen in watchdog._others.values()} == {30.0}
    watchdog.close()


def test_the_connections_of_all_ranks_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.__setitem__(slice(2), list(both)))
    meeting._allow_connections(100)
    assert limits == [1024, 4096]
    meeting._allow_connections(1000)
    assert limits == [3500, 4096]
    with pytest.raises(UserError, match="about 12500 open files for the connections of 4000 ranks, and its limit is"):
        meeting._allow_connections(4000)
