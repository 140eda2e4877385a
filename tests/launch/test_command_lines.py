"""The command lines of the README, as a user types them."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shardlaunch.sharding.environment import LaunchEnvironment
from shardlaunch.sharding.resolve import resolve_strategy
from tests.distributed.ranks import free_port
from tests.launch.command import ACCELERATE, PLAIN, PYTHON, SHARDLAUNCH, TORCHRUN, end_of, environment, forked_end_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
RANKS_OF_CONFIGS = {
    "ddp": 2,
    "dp": 1,
    "fsdp2": 2,
    "hsdp": 4,
    "zero1": 2,
    "zero2": 2,
    "zero2_offload": 2,
    "zero3": 2,
    "zero3_offload": 2,
}
CONFIGURED = {
    f"accelerate launch {name}.yaml": (
        (*ACCELERATE, "--config_file", str(CONFIGS / f"{name}.yaml")),
        num_ranks,
        name.removesuffix("_offload"),
    )
    for name, num_ranks in RANKS_OF_CONFIGS.items()
}
LAUNCHERS = {
    "python": (PYTHON, 1, "single"),
    "accelerate launch": (ACCELERATE, 1, "single"),
    **{name: CONFIGURED[name] for name in map("accelerate launch {}.yaml".format, ("dp", "ddp", "zero3_offload"))},
    "torchrun": ((*TORCHRUN, "--nproc_per_node", "2"), 2, "ddp"),
    "shardlaunch run": ((*SHARDLAUNCH, "run"), 1, "single"),
    "shardlaunch run --ranks 3": ((*SHARDLAUNCH, "run", "--ranks", "3", "--strategy", "ddp"), 3, "ddp"),
    "shardlaunch run --strategy dp": ((*SHARDLAUNCH, "run", "--strategy", "dp"), 1, "dp"),
    "shardlaunch run --strategy fsdp2": ((*SHARDLAUNCH, "run", "--ranks", "2", "--strategy", "fsdp2"), 2, "fsdp2"),
}
# Writes what a rank is told by its launcher, without training.
PROBE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from shardlaunch.sharding.environment import read_environment

env = read_environment()
Path(sys.argv[1], str(env.rank)).write_text(json.dumps(asdict(env)))
"""


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_starts_the_run_that_was_asked_for(name: str, hf_home: Path, tmp_path: Path) -> None:
    words, num_ranks, strategy = LAUNCHERS[name]
    separator = ("--",) if "shardlaunch" in name else ()
    options = ["--output-dir", str(tmp_path)]
    if name.endswith("dp.yaml") and strategy == "dp":
        options += ["--strategy", "dp"]  # accelerate has no name for it, as the file says
    ended = end_of((*words, PLAIN, *separator, *options), _unforced(hf_home))
    assert ended.status == 0, ended.both
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["ranks"], record["strategy"]) == (num_ranks, strategy)
    # accelerate and torchrun say which of their defaults they use.
    assert "accelerate" in name or name == "torchrun" or ended.err == "", ended.both
    if strategy == "dp":
        assert "on CPU there is only one" in ended.out
    if name.endswith("_offload.yaml"):
        assert "shards in host memory" in ended.out


@pytest.mark.parametrize("name", sorted(CONFIGURED.keys() - LAUNCHERS.keys()))
def test_every_configuration_starts_the_ranks_that_it_names(name: str, hf_home: Path, tmp_path: Path) -> None:
    """Real launchers and ranks; what the ranks then train is in the test above and in tests/distributed."""
    words, num_ranks, strategy = CONFIGURED[name]
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "ranks").mkdir()
    ended = end_of((*words, str(tmp_path / "probe.py"), str(tmp_path / "ranks")), _unforced(hf_home))
    assert ended.status == 0, ended.both
    told = [LaunchEnvironment(**json.loads(path.read_text())) for path in (tmp_path / "ranks").iterdir()]
    assert sorted(env.rank for env in told) == list(range(num_ranks))
    for env in told:
        assert (env.world_size, resolve_strategy("auto", env)) == (num_ranks, strategy)
        assert env.cpu_offload == name.endswith("_offload.yaml")


def _unforced(hf_home: Path) -> dict[str, str]:
    """Return an environment without GPUs that does not say so: accelerate goes by the GPUs that it finds."""
    env = environment(hf_home, {"CUDA_VISIBLE_DEVICES": ""})
    del env["ACCELERATE_USE_CPU"]
    return env


def test_every_configuration_is_tested_and_has_a_twin_for_several_machines() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RANKS_OF_CONFIGS)
    assert {path.stem for path in (CONFIGS / "multi_node").glob("*.yaml")} == set(RANKS_OF_CONFIGS) - {"dp"}


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_two_machines(strategy: str, hf_home: Path, tmp_path: Path) -> None:
    """Two launchers on one machine, with a rank each, stand in for two machines. They train under FSDP2 alone."""
    port = free_port()
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "ranks").mkdir()
    trained = (PLAIN, "--output-dir", str(tmp_path))
    started = trained if strategy == "fsdp2" else (str(tmp_path / "probe.py"), str(tmp_path / "ranks"))
    env = environment(hf_home, {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"})
    launchers = [
        subprocess.Popen(
            [
                *(*ACCELERATE, "--config_file", str(CONFIGS / "multi_node" / f"{strategy}.yaml")),
                *("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
                *("--machine_rank", str(machine), *started),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine in (0, 1)
    ]
    outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    if started is trained:
        record = json.loads((tmp_path / "run.json").read_text())
        assert (record["ranks"], record["strategy"]) == (2, strategy)
    else:
        told = [LaunchEnvironment(**json.loads(path.read_text())) for path in (tmp_path / "ranks").iterdir()]
        assert sorted(env.rank for env in told) == [0, 1]
        assert {(env.world_size, resolve_strategy("auto", env)) for env in told} == {(2, strategy)}


def test_the_recipe_in_the_readme_works_outside_the_repo(hf_home: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 60
    (tmp_path / "my_recipe.py").write_text(code)
    words = (*SHARDLAUNCH, "run", str(tmp_path / "my_recipe.py"), "--ranks", "2", "--")
    ended = end_of((*words, "--max-steps", "5", "--output-dir", str(tmp_path / "run")), environment(hf_home))
    assert ended.status == 0, ended.both
    helped = forked_end_of((*PYTHON, str(tmp_path / "my_recipe.py"), "--help"), environment(hf_home))
    assert helped.status == 0
    assert "--global-batch-size" in helped.out


def test_a_wheel_installs_one_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"shardlaunch"}
    for needed in ("py.typed", "launcher/training/trainer.py", "sharding/resolve.py", "checkpoints/writer.py"):
        assert f"shardlaunch/{needed}" in names
