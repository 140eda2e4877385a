"""The launch files can be read, and say what docs/clusters.md says of them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardlaunch.errors import EXIT_STOPPED, EXIT_USER_ERROR
from shardlaunch.sharding.environment import read_environment

FOLDER = Path(__file__).resolve().parents[2] / "launch_configs"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


def settings(script: Path) -> dict[str, str]:
    """Return the #SBATCH options of a script."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.M)
    assert len(found) == script.read_text().count("#SBATCH")  # none is written in a way that Slurm would not read
    return dict(found)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_sbatch(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    options, text = settings(script), script.read_text()
    assert options["open-mode"] == "append"
    assert "requeue" in options
    lead = re.fullmatch(r"USR1@(\d+)", options["signal"])  # with B: the ranks would not get it
    assert lead is not None
    assert f"--grace-s {lead[1]} " in text
    assert f'"$status" -eq {EXIT_STOPPED} ]' in text
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in text
    num_ranks = re.search(r"--ranks (\d+)", text)
    assert options["gpus-per-node"] == (num_ranks[1] if num_ranks else options["ntasks-per-node"])


def test_kubernetes_job() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes_job.yaml").read_text())
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(env["WORLD_SIZE"]) == spec["completions"] == spec["parallelism"]
    grace = container["command"][container["command"].index("--grace-s") + 1]
    assert int(grace) == pod["terminationGracePeriodSeconds"]
    rules = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {EXIT_USER_ERROR: "FailJob", EXIT_STOPPED: "Ignore"}
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    ranks = [read_environment({**env, "RANK": str(index), "JOB_COMPLETION_INDEX": str(index)}) for index in range(2)]
    assert [(one.rank, one.world_size, one.master_addr) for one in ranks] == [
        (0, 2, "train-0.train"),
        (1, 2, "train-0.train"),
    ]
