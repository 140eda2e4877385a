"""Errors that end a run started by `launch`."""

from pathlib import Path
from typing import Any

import pytest

from shardlaunch.launcher.launch import main
from tests.recipes import NetRecipe


class LosesItsDatabase(NetRecipe):
    def datasets(self) -> Any:
        raise RuntimeError("the database: connection reset by peer")


def test_one_rank_does_not_lose_contact_with_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the database"):
        main(LosesItsDatabase, ["--output-dir", str(tmp_path / "run")])
