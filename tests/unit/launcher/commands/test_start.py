"""`start`: how failures of the processes that it starts are raised."""

from pathlib import Path

import pytest

from shardlaunch import UserError, start

RECIPE = """
from shardlaunch import Recipe, UserError, launch

class Refusing(Recipe):
    def datasets(self):
        raise UserError("the data base is down: fatal error: no room. Make room")

launch(Refusing)
"""


def test_a_message_is_raised_whole(tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text(RECIPE)
    with pytest.raises(UserError) as error:
        start(tmp_path / "refusing.py", output_dir=tmp_path / "run")
    assert str(error.value) == "the data base is down: fatal error: no room. Make room"
