"""When a run that has failed starts again, and on how many ranks."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from shardlaunch.launcher.commands import agent
from shardlaunch.launcher.commands.agent import Restarts


def _failures(*codes: int) -> list[ProcessFailure]:
    return [
        ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file="none")
        for rank, code in enumerate(codes)
    ]


def _restarts(folder: Path, most: int, *, min_ranks: int = 4, uses_gpus: bool = False) -> Restarts:
    return Restarts(most, ranks=4, min_ranks=min_ranks, uses_gpus=uses_gpus, saves=folder / "saves")


def _save(folder: Path) -> None:
    with open(folder / "saves", "ab") as file:
        file.write(b".")


def test_counts_begin_anew_with_each_checkpoint(tmp_path: Path) -> None:
    restarts = _restarts(tmp_path, 2)
    for _ in range(5):
        assert restarts.allows(_failures(1))
        assert restarts.allows(_failures(1))
        _save(tmp_path)
    assert restarts.allows(_failures(1))
    assert restarts.allows(_failures(1))
    assert not restarts.allows(_failures(1))
    assert restarts.why_none == "failed 3 times without a new checkpoint between"


@pytest.mark.parametrize("code", [2, 75, 130])
def test_a_refusal_and_a_stop_are_final(code: int, tmp_path: Path) -> None:
    assert not _restarts(tmp_path, 9).allows(_failures(1, code, -15))


def test_without_the_option_nothing_starts_again(tmp_path: Path) -> None:
    restarts = _restarts(tmp_path, 0)
    assert not restarts.allows(_failures(1))
    assert restarts.why_none == ""


def test_ranks_become_fewer_and_all_again_after_a_checkpoint(tmp_path: Path) -> None:
    restarts = _restarts(tmp_path, 9, min_ranks=2)
    found = []
    for _ in range(4):
        assert restarts.allows(_failures(-9))
        found.append(restarts.ranks)
    assert found == [4, 3, 2, 2]
    _save(tmp_path)
    assert restarts.allows(_failures(-9))
    assert restarts.ranks == 4


@pytest.mark.parametrize(("num_gpus", "ranks"), [(8, 4), (4, 4), (3, 3), (1, 0)])
def test_as_many_ranks_as_gpus_work(num_gpus: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of GPUs is made up: there are none here."""
    monkeypatch.setattr(agent, "_count_gpus", lambda: num_gpus)
    restarts = _restarts(tmp_path, 9, min_ranks=2, uses_gpus=True)
    assert restarts.allows(_failures(1)) == (ranks > 0)
    assert restarts.ranks == (ranks or 4)
    assert ("1 GPUs are left" in restarts.why_none) == (ranks == 0)


def test_names_the_rank_that_failed_not_one_that_lost_contact(tmp_path: Path) -> None:
    restarts = _restarts(tmp_path, 3)
    failures = _failures(1, 1, -9)
    assert restarts.allows(failures)
    assert restarts.text(failures) == (
        "rank 2 of this machine was killed (SIGKILL); the run starts again on 4 ranks: "
        "restart 1 of 3 without a new checkpoint between"
    )
    assert "rank 0 of this machine ended with status 7" in restarts.text(_failures(7))
