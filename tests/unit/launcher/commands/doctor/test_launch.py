"""What the environment means for a launch: made-up environments."""

import time
from pathlib import Path
from typing import Any

import pytest

from shardlaunch.launcher.commands.doctor import accelerate_file, launch
from shardlaunch.sharding.environment import LaunchEnvironment
from tests.unit.launcher.commands.doctor.levels import fine, only, said

TWO = {"RANK": "0", "WORLD_SIZE": "2"}
MET = {**TWO, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "level", "part"),
    [
        ({"RANK": "1"}, "problem", "no WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "problem", "contradict each other"),
        ({**TWO, "WORLD_SIZE": "two"}, "problem", "not a whole number"),
        ({**MET, "MASTER_PORT": "0"}, "problem", "MASTER_PORT=0"),
        ({"OMP_NUM_THREADS": "0"}, "problem", "OMP_NUM_THREADS=0"),
        ({"ACCELERATE_USE_FSDP": "true"}, "problem", "FSDP version 1"),
        (TWO, "problem", "no address where the ranks meet"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "localhost"}, "problem", "has started one"),
        (MET, "note", "waits 600 s for the other 1"),
        ({**MET, "TORCHELASTIC_RUN_ID": "x"}, "note", "one of 2 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "note", "-> unset RANK and WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, "note", "or what one has left over -> "),
        ({"MASTER_PORT": "29500", "LOCAL_RANK": "0"}, "note", "unset LOCAL_RANK MASTER_PORT"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}, "note", "ACCELERATE_USE_FSDP: variables of accelerate"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "note", "decide the precision"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", **{"MASTER_ADDR": "a", "MASTER_PORT": "1"}},
            "note",
            "started by mpirun (Open MPI)",
        ),
    ],
)
def test_variables_of_launchers(env: dict[str, str], level: str, part: str) -> None:
    found, findings = launch.check_environment(env)
    only(findings, level, part)
    assert (found is None) == ("stops with this message" in said(findings, "problem"))


def test_without_variables_all_is_well() -> None:
    found, findings = launch.check_environment({"PATH": "/bin"})
    assert found == LaunchEnvironment()
    fine(findings)
    fine(launch.check_variables({"PATH": "/bin", "SHARDLAUNCH_RANKS": "2", "CUDA_LAUNCH_BLOCKING": "0"}))


def test_a_restart_is_said() -> None:
    env = {**MET, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert "restarted its ranks 2 times" in said(launch.check_environment(env)[1], "note")


@pytest.mark.parametrize(
    ("env", "given", "level", "part"),
    [
        ({}, {"strategy": "single"}, "problem", "is for one process"),
        ({}, {"strategy": "hsdp"}, "problem", "at least"),
        ({"strategy": "zero2"}, {"strategy": "option:fsdp2"}, "problem", "two strategies"),
        ({"accelerate_strategy": "fsdp2"}, {"strategy": "option:ddp"}, "problem", "two strategies"),
        ({"strategy": "zero9"}, {}, "problem", "unknown strategy 'zero9'"),
        ({}, {"num_gpus": 1}, "problem", "has 1 GPUs"),
        ({"is_distributed": True, "world_size": 2, "ranks": 4}, {}, "problem", "but 2 ranks run"),
        ({"ranks": 4}, {}, "note", "SHARDLAUNCH_RANKS=4 is left over"),
    ],
)
def test_strategy(env: dict[str, Any], given: dict[str, Any], level: str, part: str) -> None:
    words = {"ranks": 2, "strategy": "auto", "num_gpus": 0, **given}
    only(launch.check_strategy(LaunchEnvironment(**env), **words), level, part)


def test_what_auto_chooses() -> None:
    alone, asked = LaunchEnvironment(), {"strategy": "auto", "num_gpus": 0}
    (one,) = launch.check_strategy(alone, ranks=1, **asked)
    (two,) = launch.check_strategy(alone, ranks=2, **asked)
    within = LaunchEnvironment(is_distributed=True, world_size=4)
    assert launch.check_strategy(within, ranks=2, **asked)[0].text == "strategy ddp (auto) on 4 ranks"
    (anew,) = launch.check_strategy(LaunchEnvironment(strategy="zero1"), ranks=2, strategy="fsdp2", num_gpus=0)
    assert anew.text == "strategy fsdp2 on 2 ranks"
    (by_file,) = launch.check_strategy(LaunchEnvironment(accelerate_strategy="fsdp2"), ranks=2, **asked)
    assert [one.text, two.text] == ["strategy single (auto) on 1 rank", "strategy ddp (auto) on 2 ranks"]
    assert by_file.text.endswith("on 2 ranks, from accelerate's configuration")


def test_precision() -> None:
    only(launch.check_precision("fp16", LaunchEnvironment(accelerate_precision="bf16")), "problem", "Remove one")
    (found,) = launch.check_precision("auto", LaunchEnvironment(accelerate_precision="bf16"))
    assert found.text == "precision bf16"


def test_threads() -> None:
    def check(threads: int | None) -> Any:
        return launch.check_threads(LaunchEnvironment(threads=threads), ranks=2, num_cores=4, num_gpus=0)

    only(check(4), "note", "have 8 threads on 4 cores")
    with_gpus = launch.check_threads(LaunchEnvironment(threads=4), ranks=2, num_cores=4, num_gpus=2)
    assert ("shardlaunch run" in check(4)[0].text, "shardlaunch run" in with_gpus[0].text) == (True, False)
    for threads in (None, 1, 2):
        fine(check(threads))
    assert check(1)[0].text.startswith("OMP_NUM_THREADS=1 counts as unset: 2 threads")


@pytest.mark.parametrize(
    ("env", "level", "part"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "note", "hides all GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "note", "hides all GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "0,0"}, "problem", "names a GPU twice"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,9"}, "problem", "names 3 GPUs, of which torch sees 2"),
        ({"DS_ACCELERATOR": "cpu"}, "problem", "DeepSpeed would use another device"),
    ],
)
def test_variables_of_gpus(env: dict[str, str], level: str, part: str) -> None:
    only(launch.check_gpu_variables(env, num_gpus=2, use_cpu=False), level, part)


def test_gpus_that_are_not_used() -> None:
    env = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "0,1"}
    only(launch.check_gpu_variables(env, num_gpus=2, use_cpu=True), "note", "the 2 GPUs are not used")
    fine(launch.check_gpu_variables({"CUDA_VISIBLE_DEVICES": "0,1"}, num_gpus=2, use_cpu=False))


@pytest.mark.parametrize(
    ("env", "level", "part"),
    [
        ({"SHARDLAUNCH_RANK": "2"}, "problem", "did you mean SHARDLAUNCH_RANKS?"),
        ({"SHARDLAUNCH_XYZ": "2"}, "problem", "unset it; there are SHARDLAUNCH_"),
        ({"TORCH_DISTRIBUTED_DEBUG": "detail"}, "note", "steps are slow"),
        ({"NCCL_P2P_DISABLE": "1"}, "note", "through host memory"),
        ({"MKL_NUM_THREADS": "4"}, "note", "instead of --threads-per-rank"),
        ({"OMP_PROC_BIND": "true"}, "note", "bound to cores"),
        ({"SLURM_JOB_END_TIME": "12"}, "note", "is in the past"),
    ],
)
def test_other_variables(env: dict[str, str], level: str, part: str) -> None:
    only(launch.check_variables(env), level, part)


def test_the_end_of_a_job() -> None:
    (found,) = launch.check_variables({"SLURM_JOB_END_TIME": str(int(time.time()) + 3600)})
    assert found.text.startswith(("the job ends in 60 min", "the job ends in 59 min"))


def test_signals_that_are_ignored() -> None:
    status = "Name:\tx\nSigBlk:\t0000000000000003\nSigIgn:\t0000000000001003\nSigCgt:\t0000000000004000\n"
    assert launch.ignores_hangup(status)
    only(launch.check_signals(True), "note", "SIGHUP: ignored")
    assert not launch.ignores_hangup("")
    assert not launch.ignores_hangup("SigIgn:\t0000000000000002")
    fine(launch.check_signals(False))


@pytest.mark.parametrize(
    ("text", "level", "part"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 4", "problem", "starts one process, not 4"),
        ("distributed_type: MULTI_GPU\nuse_cpu: yes\nnum_processes: 2", "problem", "all write one folder"),
        ("distributed_type: MULTI_GPU\nnum_processes: 1", "problem", "num_processes is 1"),
        ("distributed_type: FSDP\nuse_cpu: true\nnum_processes: 2", "problem", "write fsdp_version: 2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}", "note", "there is no GPU"),
        ("distributed_type: 'NO'\ngradient_accumulation_steps: 4", "problem", "gradient_accumulation_steps 4"),
        ("distributed_type: 'NO'\ndynamo_config: {dynamo_backend: INDUCTOR}", "problem", "dynamo_backend inductor"),
        ("distributed_type: MULTI_GPU\nmain_process_port: 29500\nnum_processes: 2", "note", "a second run"),
        ("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 3", "problem", "starts 1 on each of 2 machines"),
        ("num_processes: 2", "problem", "no distributed_type"),
        ("num_processes: many", "problem", "not a number"),
        ("- 1", "problem", "no mapping"),
        ("a: [", "problem", "cannot be read"),
    ],
)
def test_default_file_of_accelerate(text: str, level: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "default_config.yaml"
    path.write_text(text)
    only(accelerate_file.check_default_file(path, num_gpus=0), level, part)


def test_default_file_for_more_gpus_than_there_are(tmp_path: Path) -> None:
    path = tmp_path / "default_config.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\nnum_machines: 2")
    only(accelerate_file.check_default_file(path, num_gpus=2), "problem", "starts 4 processes on this machine")
    (found,) = accelerate_file.check_default_file(path, num_gpus=4)
    assert (found.level, found.text.endswith(": MULTI_GPU, 8 processes")) == ("ok", True)
    assert accelerate_file.check_default_file(tmp_path / "none.yaml", num_gpus=0) == []


def test_where_the_default_file_is() -> None:
    assert accelerate_file.default_file({"HF_HOME": "/h"}) == Path("/h/accelerate/default_config.yaml")
    by_xdg = accelerate_file.default_file({"XDG_CACHE_HOME": "/x"})
    assert by_xdg == Path("/x/huggingface/accelerate/default_config.yaml")
