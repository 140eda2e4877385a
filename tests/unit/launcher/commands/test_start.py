"""What `shardlaunch run` refuses before it starts anything."""

from pathlib import Path
from typing import Any

import pytest

from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.start import run_recipe


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_restarts": -1}, "--max-restarts -1: must be at least 0"),
        ({"max_restarts": 1, "min_ranks": 3}, "--min-ranks 3: must be from 1 to --ranks, 2"),
        ({"min_ranks": 1}, "--min-ranks: needs --max-restarts"),
        ({"rendezvous": "10.0.0.1:29400"}, "needs --hosts"),
        ({"hosts": "2"}, "needs --rendezvous HOST:PORT"),
        ({"hosts": "2", "rendezvous": "10.0.0.1"}, "needs --rendezvous HOST:PORT"),
        ({"hosts": "4:2", "rendezvous": "10.0.0.1:29400"}, "--hosts 4:2: must be"),
        ({"hosts": "0", "rendezvous": "10.0.0.1:29400"}, "--hosts 0: must be"),
        ({"hosts": "many", "rendezvous": "10.0.0.1:29400"}, "--hosts many: must be"),
    ],
)
def test_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run_recipe(Path("none.py"), [], ranks=2, strategy="ddp", **options)
