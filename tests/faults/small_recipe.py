"""A recipe file whose run takes half a second, for the campaigns. With --replicate-every, each rank is a machine."""

import os
import socket
import sys
from pathlib import Path

from shardlaunch import launch
from tests.recipes import NetRecipe

if "--replicate-every" in sys.argv:
    machine = f"machine-{os.environ['RANK']}"
    socket.gethostname = lambda: machine
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    run_dir = Path(sys.argv[sys.argv.index("--output-dir") + 1])
    os.environ["SHARDLAUNCH_MEMORY_DIR"] = str(run_dir / machine)
launch(NetRecipe)
