"""A run that comes to a stop is ended, with the rank and the place (the long form: `python -m tests.faults.hangs`)."""

import pytest

from tests.faults.hangs import CASES, Folder, check_hang

SHORT = ("step stop, rank 0, ddp on 2, ", "data sleep, rank 0, ddp on 2, --num-workers 2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("hangs")
    return Folder(path, path / "hf")


@pytest.mark.parametrize("name", SHORT)
def test_a_rank_that_stops_is_named_and_the_run_goes_on(name: str, folder: Folder) -> None:
    (case,) = (case for case in CASES if case.name == name)
    check_hang(case, folder)
