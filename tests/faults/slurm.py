"""Run recipes in a real Slurm cluster, started on this machine: python -m tests.faults.slurm [--only WORD].

Needs root and the programs of Slurm and munge; without, it says so and ends with status 0. The sbatch files of
launch_configs/ are submitted to the letter. Each case is compared with a run that nothing happened to. Prints a table;
the exit status is 1 if a case is bad.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shardlaunch.errors import EXIT_STOPPED, EXIT_USER_ERROR
from tests.faults.cases import main_of_cases, run_cases
from tests.faults.slurm_cluster import Cluster, slurm_cluster, why_not
from tests.launch.command import environment
from tests.recipes import final_tensors, training_lines

ROOT = Path(__file__).resolve().parents[2]
SEVERAL, ONE = (str(ROOT / "launch_configs" / f"slurm_{name}.sbatch") for name in ("several_nodes", "one_node"))
NUM_STEPS = 40
RECIPE = f"""
import os
import time
from dataclasses import dataclass
import torch
from shardlaunch import Options, Recipe, TensorData, launch, option

@dataclass(kw_only=True)
class SlowOptions(Options):
    global_batch_size: int = 16
    micro_batch_size: int = 2
    max_steps: int = {NUM_STEPS}
    lr: float = 0.1
    threads_per_rank: int = 1
    tracker: str = option("none", mark="free")

class Slow(Recipe):
    options: SlowOptions

    def datasets(self):
        inputs = torch.rand(128, 4, generator=torch.Generator().manual_seed(0))
        return {{"train": TensorData(inputs=inputs, labels=(inputs.sum(1) > 2).long())}}

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def loss(self, outputs, batch):
        time.sleep(float(os.environ.get("SLOW_S", "0")))
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

launch(Slow)
"""
SLOW_S = 0.2  # per micro-batch
PYTHON = "python"


class Campaign:
    """Runs cases on a cluster, and knows the runs to which nothing happened."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._whole: dict[str, Path] = {}
        self._count = 0

    def run(self, words: Sequence[str], run_dir: Path, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run a recipe's command line with its output folder at the end."""
        end = ["--", "--output-dir"] if "shardlaunch" in words else ["--output-dir"]
        return self._cluster.run("env", *_settings(env), *words, "slow.py", *end, str(run_dir))

    def new_dir(self) -> Path:
        """Return the folder of the next run."""
        self._count += 1
        return self._cluster.folder / f"run-{self._count}"

    def difference(self, run_dir: Path, words: Sequence[str]) -> str:
        """Compare a run with one by the same words that nothing happened to."""
        key = " ".join(words)
        if key not in self._whole:
            whole = self.new_dir()
            ended = self.run(words, whole)
            assert ended.returncode == 0, ended
            self._whole[key] = whole
        whole = self._whole[key]
        if training_lines(run_dir) != training_lines(whole):
            return "other metrics"
        mine, other = final_tensors(run_dir), final_tensors(whole)
        same = mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)
        return "" if same else "other weights"

    def srun(self, *words: str) -> str:
        """Run by srun on both machines, and compare with a single process."""
        return self.ranks("srun", "-N2", "--ntasks-per-node=2", *words, PYTHON, says="started by srun (Slurm step ")

    def ranks(self, *words: str, says: str = "") -> str:
        """Run on four ranks, and compare with a single process."""
        run_dir = self.new_dir()
        ended = self.run(words, run_dir)
        out = " ".join(ended.stdout.split())
        is_right = ended.returncode == 0 and says in out and "4 x CPU" in out and "warning:" not in out
        return self._near_one_process(run_dir) if is_right else f"{ended}"

    def alone(self, words_of: Callable[[str], Sequence[str]], *, says: str, typed: bool = False) -> str:
        """Run in a way that is to give one process and a warning. `words_of` a command line; or it is typed."""
        run_dir = self.new_dir()
        command = f"{PYTHON} slow.py --output-dir {run_dir}"
        ended = self._cluster.run(*words_of(command), input=f"{command}\nexit\n" if typed else None)
        log = self._cluster.folder / "alone.out"
        said = " ".join((ended.stdout + ended.stderr + (log.read_text() if log.exists() else "")).split())
        log.unlink(missing_ok=True)
        if ended.returncode or says not in said:
            return f"{ended.returncode}: {said}"
        return self._near_one_process(run_dir)

    def _near_one_process(self, run_dir: Path) -> str:
        if "one" not in self._whole:
            self._whole["one"] = self.new_dir()
            ended = self.run([PYTHON], self._whole["one"])
            assert ended.returncode == 0, ended
        mine, other = ([line["loss"] for line in training_lines(folder)] for folder in (run_dir, self._whole["one"]))
        same = len(mine) == len(other) and all(abs(a - b) < 1e-5 for a, b in zip(mine, other, strict=True))
        return "" if same else f"other losses: {mine[-1:]}, {other[-1:]} after {len(mine)}, {len(other)} steps"

    def two_steps(self) -> str:
        """Run two steps of one job at the same time."""
        runs = [self.new_dir(), self.new_dir()]
        command = f"SLOW_S=0.02 srun -N2 -n2 --exact {PYTHON} slow.py --output-dir"
        first, second = (f"{command} {run_dir} > {run_dir}.out 2>&1 &\n" for run_dir in runs)
        script = f"{first}pid=$!\n{second}wait $! && wait $pid\n"
        ended = self._cluster.run("salloc", "-N2", "--ntasks-per-node=2", "bash", "-c", script)
        if ended.returncode:
            return f"{ended} {[Path(f'{run_dir}.out').read_text() for run_dir in runs]}"
        ports = {re.findall(r"meet at n1:(\d+)", Path(f"{run_dir}.out").read_text())[0] for run_dir in runs}
        return self._near_one_process(runs[0]) or ("" if len(ports) == 2 else f"one port: {ports}")

    def contradiction(self) -> str:
        """Leave torchrun's variables of one process in the environment of four tasks."""
        began = time.monotonic()
        ended = self.run(["srun", "-N2", "-n4", PYTHON], self.new_dir(), RANK="0", WORLD_SIZE="1")
        took = time.monotonic() - began
        said = ended.stderr.count("contradict each other")
        # Tasks that are not the first print a little later, in case that the first does not fail.
        return "" if ended.returncode == EXIT_USER_ERROR and said and took < 60 else f"{ended} in {took:.0f} s"

    def submitted(self, script: str, ask: Callable[[int], None], *options: str, slow_s: float = SLOW_S) -> str:
        """Submit a script, have it stopped, see it queued again, and compare its end with a whole run."""
        run_dir, job = self._submit(script, *options, slow_s=slow_s)
        ask(job)
        log = self._cluster.folder / f"shardlaunch-{job}.out"
        self._wait(lambda: int(self._cluster.state(job).get("Restarts", 0)) > 0, f"not requeued: {log.read_text()}")
        if f"status {EXIT_STOPPED}" in log.read_text() or ": stopped after step" not in log.read_text():
            return f"not stopped in time: {log.read_text()}"
        stopped = len(training_lines(run_dir))
        self._start_now(job)
        state = self._cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED")
        if state["JobState"] != "COMPLETED" or not 0 < stopped < NUM_STEPS:
            return f"{state['JobState']} after a stop at step {stopped}: {log.read_text()}"
        words = ["srun", "-N2", "--ntasks-per-node=2", PYTHON]
        if script == ONE:
            words = ["srun", "-N1", "-n2", PYTHON]
        return self.difference(run_dir, words)

    def cancelled(self) -> str:
        """Cancel a job: it saves, ends, and does not come back."""
        run_dir, job = self._submit(SEVERAL)
        self._cluster.run("scancel", str(job))
        self._cluster.wait_for(job, "CANCELLED", "PENDING", "REQUEUED")
        time.sleep(5)
        log = (self._cluster.folder / f"shardlaunch-{job}.out").read_text()
        state = self._cluster.state(job)
        is_right = state["JobState"] == "CANCELLED" and state["Restarts"] == "0" and ": stopped after step" in log
        steps = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
        return "" if is_right and steps else f"{state} {steps} {log}"

    def _submit(self, script: str, *options: str, slow_s: float = SLOW_S) -> tuple[Path, int]:
        run_dir = self.new_dir()
        words = ["sbatch", "--parsable", *options, script, "slow.py", "--output-dir", str(run_dir)]
        done = self._cluster.run("env", *_settings({"SLOW_S": str(slow_s)}), *words)
        assert done.returncode == 0, done
        job = int(done.stdout)
        log = self._cluster.folder / f"shardlaunch-{job}.out"
        self._wait(lambda: len(training_lines(run_dir)) > 2, "trains nothing", log)
        return run_dir, job

    def _start_now(self, job: int) -> None:
        """Start a job that was queued again; Slurm would wait two minutes."""
        self._wait(lambda: self._cluster.state(job)["JobState"] in ("PENDING", "RUNNING"), "not pending")
        time.sleep(3)  # Slurm counts in seconds: at once, the machines would take the job for the one before
        self._cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=10")

    def _wait(self, condition: Callable[[], bool], otherwise: str, log: Path | None = None) -> None:
        end = time.monotonic() + 240
        while not _holds(condition):
            text = log.read_text() if log is not None and log.exists() else ""
            assert time.monotonic() < end, f"{otherwise} {text}"
            time.sleep(0.2)

    def signal(self, job: int) -> None:
        """Send what Slurm sends two minutes before the end."""
        self._cluster.run("scancel", "--signal=USR1", str(job))

    def preempt(self, job: int) -> None:
        """Submit a job that takes precedence, and needs all machines."""
        self._cluster.run("sbatch", "--partition=high", "-N2", "--exclusive", "--time=5", "--wrap=sleep 3")


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (OSError, KeyError):
        return False


def _settings(env: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in env.items()]


def cases(campaign: Campaign) -> dict[str, Callable[[], str]]:
    """Return the cases by name; each returns what is wrong."""
    lone = "srun did not start this process: it trains alone"
    per_machine = ("srun", "-N2", "--ntasks-per-node=1", "--cpus-per-task=2")
    meeting = ("--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400")
    batch = ("sbatch", "-N2", "-n4", "--wait", "--output=alone.out", "--wrap")
    return {
        "srun, 2 machines x 2 tasks": campaign.srun,
        "srun, ranks dealt in turn, fsdp2": lambda: campaign.srun("-m", "cyclic", "env", "SHARDLAUNCH_STRATEGY=fsdp2"),
        "srun, 3 and 1 tasks, fsdp2": lambda: campaign.srun(
            "--ntasks=4", "--ntasks-per-node=4", "env", "SHARDLAUNCH_STRATEGY=fsdp2"
        ),
        "two steps at once": campaign.two_steps,
        "torchrun in tasks of srun": lambda: campaign.ranks(*per_machine, "torchrun", *meeting),
        "shardlaunch run in tasks of srun": lambda: campaign.ranks(
            *per_machine, "shardlaunch", "run", "--ranks=2", "--hosts=2", "--rendezvous=n1:29401"
        ),
        "mpirun in an allocation": lambda: campaign.ranks(
            *("salloc", "-N2", "--ntasks-per-node=2", "mpirun", "--allow-run-as-root", PYTHON),
            says="OMPI_COMM_WORLD_RANK=0 and OMPI_COMM_WORLD_SIZE=4; the ranks meet at n1:",
        ),
        "a shell of salloc": lambda: campaign.alone(
            lambda command: ("salloc", "-N2", "-n4", *command.split()), says=lone
        ),
        "a batch script without srun": lambda: campaign.alone(lambda command: (*batch, command), says=lone),
        "a shell of srun --pty": lambda: campaign.alone(
            lambda _: ("script", "-qec", "srun -N2 -n4 --pty bash --norc", "/dev/null"), says="srun --pty", typed=True
        ),
        "a leftover RANK": campaign.contradiction,
        "slurm_several_nodes.sbatch, USR1": lambda: campaign.submitted(SEVERAL, campaign.signal),
        "slurm_several_nodes.sbatch, preempted": lambda: campaign.submitted(SEVERAL, campaign.preempt),
        "slurm_several_nodes.sbatch, end of its time": lambda: campaign.submitted(
            SEVERAL,
            lambda job: None,  # Slurm sends the signal some time in the first minute
            "--time=00:03:00",
            slow_s=1.0,
        ),
        "slurm_several_nodes.sbatch, scancel": campaign.cancelled,
        "slurm_one_node.sbatch, USR1": lambda: campaign.submitted(ONE, campaign.signal),
        "slurm_one_node.sbatch, preempted": lambda: campaign.submitted(ONE, campaign.preempt),
    }


def run(only: str = "", say: Callable[[str], None] = print) -> int:
    """Run the cases, print a table, and return the number of those that are bad."""
    with tempfile.TemporaryDirectory(prefix="shardlaunch-slurm-") as name:
        folder = Path(name)
        (folder / "slow.py").write_text(RECIPE)
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        env = environment(folder / "hf", paths)
        with slurm_cluster(folder, env) as cluster:
            version = cluster.run("sinfo", "--version").stdout.strip()
            say(f"{version}: 2 machines, Python {sys.version.split()[0]}")
            found = cases(Campaign(cluster))
            if shutil.which("mpirun") is None:
                for case in [case for case in found if case.startswith("mpirun") and only in case]:
                    say(f"skipped: {case}: mpirun is not installed (in Debian: openmpi-bin)")
                    del found[case]
            return run_cases(found, only, say)


if __name__ == "__main__":
    main_of_cases(__doc__, run, why_not)
