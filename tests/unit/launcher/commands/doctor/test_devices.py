"""Cores, memory, shared memory, descriptors and GPUs: made-up /proc, /sys and devices."""

from pathlib import Path

import pytest

from shardlaunch.launcher.commands.doctor import devices
from shardlaunch.launcher.commands.doctor.devices import Gpu
from tests.unit.launcher.commands.doctor.levels import fine, only, said

GB = 10**9
H100 = Gpu(name="H100", free_bytes=80 * GB, total_bytes=80 * GB)
ROW = ["H100", "550.1", "Default", "0"]


def root_with(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Write what /proc/self/cgroup and the files below /sys/fs/cgroup hold."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_quota_below_the_cores_that_are_seen(tmp_path: Path) -> None:
    files = {"pod/cpu.max": "max 100000", "cpu.max": "250000 100000"}  # also that of a group above counts
    root = root_with(tmp_path, "0::/pod", files)
    only(devices.check_cores(root, num_affine=64, num_all=64, ranks=2), "problem", "the time of 2.5 cores, while 64")
    fine(devices.check_cores(root, num_affine=2, num_all=2, ranks=2))


def test_a_quota_of_control_groups_of_version_1(tmp_path: Path) -> None:
    files = {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1"}
    root = root_with(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job", files)
    assert devices.cpu_quota(root) == 4
    only(devices.check_cores(root, num_affine=8, num_all=8, ranks=2), "problem", "--threads-per-rank 2")


def test_groups_of_other_controllers_do_not_count(tmp_path: Path) -> None:
    files = {"cpu/all/cpu.cfs_quota_us": "100000", "cpu/all/cpu.cfs_period_us": "100000"}
    assert devices.cpu_quota(root_with(tmp_path, "4:memory:/all\n3:cpu:/all/mine", files)) == 1
    assert devices.cpu_quota(root_with(tmp_path, "4:memory:/all", files)) is None


def test_the_group_of_a_container_whose_path_is_not_there(tmp_path: Path) -> None:
    root = root_with(tmp_path, "0::/../../host/path", {"cpu.max": "100000 100000", "memory.max": "1000"})
    assert (devices.cpu_quota(root), devices.memory_limit(root)) == (1, 1000)


def test_hidden_control_groups(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    only(devices.check_cores(tmp_path, num_affine=2, num_all=2, ranks=2), "note", "nsenter --net")


def test_more_ranks_than_cores_and_fewer_cores_than_there_are(tmp_path: Path) -> None:
    only(devices.check_cores(tmp_path, num_affine=1, num_all=2, ranks=2), "note", "2 ranks share 1 core:")
    only(devices.check_cores(tmp_path, num_affine=2, num_all=8, ranks=2), "note", "2 of 8 cores")
    fine(devices.check_cores(tmp_path, num_affine=8, num_all=8, ranks=2))


def test_memory(tmp_path: Path) -> None:
    def check(root: Path, needed: int) -> list[devices.Finding]:
        return devices.check_memory(root, available_bytes=20 * GB, total_bytes=25 * GB, ranks=2, needed_per_rank=needed)

    assert check(tmp_path, 9 * GB)[0].text.endswith("of 25.0 GB; the state of 2 ranks takes at least 18.0 GB")
    assert check(tmp_path, 0)[0].text == "20.0 GB of memory free, of 25.0 GB"
    only(check(tmp_path, 11 * GB), "problem", "20.0 GB of memory are free; 2 ranks need at least 22.0 GB")
    root = root_with(tmp_path, "0::/", {"memory.max": str(4 * GB)})
    only(check(root, 3 * GB), "problem", "4.0 GB of memory are allowed by the control group")
    root = root_with(tmp_path, "5:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"})
    assert devices.memory_limit(root) is None


def test_shared_memory() -> None:
    for total in (64 * 2**20, None):
        only(devices.check_shared_memory(total, num_workers=2), "problem", "--shm-size")
        only(devices.check_shared_memory(total, num_workers=None), "note", "--shm-size")
        fine(devices.check_shared_memory(total, num_workers=0))
    fine(devices.check_shared_memory(8 * GB, num_workers=2))


def test_descriptors() -> None:
    only(devices.check_descriptors(24, ranks=2, num_workers=0), "problem", "needs about 26")
    only(devices.check_descriptors(1024, ranks=512, num_workers=0), "problem", "ulimit -n 4184")
    only(devices.check_descriptors(32, ranks=2, num_workers=2), "problem", "needs about 38")
    only(devices.check_descriptors(64, ranks=2, num_workers=0), "note", "for data in many files")
    for limit in (1024, -1):
        fine(devices.check_descriptors(limit, ranks=8, num_workers=2))


def test_limits_of_the_shell() -> None:
    none = dict.fromkeys(devices.LIMITS, -1)
    fine(devices.check_limits(none))
    only(devices.check_limits({**none, "RLIMIT_FSIZE": 10**6}), "note", "ulimit -f is 1.0 MB: a checkpoint")
    only(devices.check_limits({**none, "RLIMIT_CPU": 60}), "note", "ulimit -t is 60 s")
    only(devices.check_limits({**none, "RLIMIT_AS": 4 * GB}), "note", "ulimit -v is 4.0 GB")


def test_a_limit_of_threads(tmp_path: Path) -> None:
    root = root_with(tmp_path, "0::/job", {"job/pids.max": "100"})
    only(devices.check_tasks(root, ranks=4, num_cores=8), "problem", "--pids-limit")
    fine(devices.check_tasks(root, ranks=2, num_cores=8))
    fine(devices.check_tasks(root_with(tmp_path, "0::/job", {"job/pids.max": "max"}), ranks=99, num_cores=8))


@pytest.mark.parametrize(
    ("gpus", "rows", "cuda", "level", "part"),
    [
        ([], [ROW, ROW], None, "problem", "2 GPUs (H100), and torch uses none: this torch is a build for the CPU"),
        ([], [ROW], "13.0", "problem", "CUDA 13.0, which driver 550.1 may be too old for"),
        ([H100], [["H100", "550.1", "Prohibited", "0"]], "12.8", "problem", "compute mode is Prohibited"),
        ([H100], [["H100", "550.1", "Default", "3"]], "12.8", "problem", "3 memory errors"),
        ([H100, Gpu(name="A100", free_bytes=80 * GB, total_bytes=80 * GB)], [], "12.8", "note", "A100, H100"),
        ([Gpu(name="H100", free_bytes=20 * GB, total_bytes=80 * GB)], [ROW], "12.8", "note", "uses 60.0 GB"),
    ],
)
def test_gpus(gpus: list[Gpu], rows: list[list[str]], cuda: str | None, level: str, part: str) -> None:
    only(devices.check_gpus(gpus, rows, torch_cuda=cuda), level, part)


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: str(tmp_path / name))
    assert devices.rows_of_smi() == []  # it is gone
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100, 550.1, Default, 0'\necho odd\n")
    command.chmod(0o755)
    assert devices.rows_of_smi() == [["NVIDIA H100", "550.1", "Default", "0"]]
    command.write_text("#!/bin/sh\necho 'NVIDIA H100, 550.1, Default, 0'\nexit 9\n")
    assert devices.rows_of_smi() == []
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.rows_of_smi() == []


def test_gpus_without_a_fault() -> None:
    fine(devices.check_gpus([H100, H100], [ROW, ["H100", "550.1", "Default", "[N/A]"]], torch_cuda="12.8"))
    findings = devices.check_gpus([], [], torch_cuda="12.8")
    fine(findings)
    assert "which works here too" in said(findings, "ok")
