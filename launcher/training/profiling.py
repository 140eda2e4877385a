"""Where the time of some steps goes: traces of torch's profiler, and a table."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.recorder import StepReport
from shardlaunch.launcher.training.trainer import CountedBatch, Trainer
from shardlaunch.progress import BACKWARD, DATA, FORWARD, PARTS, WAITING, progress

NUM_BEFORE = 3
"""Steps of a start that are not like the others: they allocate, and choose kernels."""
NUM_AFTER = 1
"""Steps after those that are traced, whose operations are counted."""
_FOLDER = "profile"
_NUM_OPERATORS = 8
_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel")
_OPTIMIZER = "Optimizer.step#"
_MATMUL_SIZE = 1024
_MATMUL_S = 0.3
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# Dense products in bfloat16, by the manufacturer's data sheets.
_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0}


def profile_steps(trainer: Trainer, output_dir: Path, *, first: int, display: Display) -> None:
    """Trace steps of a trainer after step `first`, as many as --profile says. All ranks."""
    wanted = trainer.options.profile
    num_left = min(trainer.last_step, trainer.options.stop_at_step or trainer.last_step) - first
    if num_left <= 0:
        return
    num_steps = min(wanted, num_left - NUM_BEFORE - NUM_AFTER)
    if num_steps < wanted:
        there = f"{num_steps} of these" if num_steps > 0 else "none"
        display.warn(
            f"--profile {wanted}: {there} can be traced, since {num_left} steps are left, and {NUM_BEFORE} before and "
            f"{NUM_AFTER} after are needed"
        )
    if num_steps > 0:
        StepProfile(trainer, num_steps, output_dir / _FOLDER, display=display)


class StepProfile:
    """Traces some steps of a trainer on all ranks, and says on rank 0 where their time goes.

    It takes the place of the trainer's `train_step`, so that nothing goes on between steps that could outlive the run.
    """

    def __init__(self, trainer: Trainer, num_steps: int, folder: Path, *, display: Display) -> None:
        """Trace `num_steps` steps, once `NUM_BEFORE` are done."""
        self._num_steps = num_steps
        self._folder = folder
        self._world = trainer.world
        self._dtype = _DTYPES.get(trainer.precision.name, torch.float32)
        self._display = display
        self._num_done = 0
        self._tokens = self._samples = 0
        self._train_step = trainer.train_step
        trainer.train_step = self._step  # type: ignore[method-assign, assignment]

    def _step(self, counted: CountedBatch, *others: Any) -> tuple[StepReport, CountedBatch]:
        assert counted.batch is not None
        number, is_traced = self._num_done, NUM_BEFORE <= self._num_done < NUM_BEFORE + self._num_steps
        self._num_done += 1
        if number == NUM_BEFORE:
            self._begin(counted.batch.step + 1)
        counter = FlopCounterMode(display=False) if number == NUM_BEFORE + self._num_steps else None
        try:
            with counter or nullcontext():
                report, upcoming = self._train_step(counted, *others)
        except BaseException:
            if is_traced:
                self._profiler.stop()
            raise
        if is_traced:
            self._tokens += report.tokens
            self._samples += report.samples
            if upcoming.asked.stop:  # this was the last step
                self._profiler.stop()
                self._display.warn("--profile: the run has been asked to stop before all steps were traced")
            elif self._num_done == NUM_BEFORE + self._num_steps:
                self._end_trace()
        if counter is not None:
            self._end(counter.get_total_flops())
        return report, upcoming

    def _begin(self, step: int) -> None:
        self._first = step
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.reset_peak_memory_stats(self._world.device)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes to stderr that it starts and stops
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()
        self._seconds, self._begun = dict(progress.seconds), time.perf_counter()

    def _end_trace(self) -> None:
        self._took = time.perf_counter() - self._begun
        self._parts = {part: progress.seconds[part] - self._seconds[part] for part in PARTS}
        self._profiler.stop()

    def _end(self, flops: int) -> None:
        summary = self._summary(flops, matmul_tflops(self._world.device, self._dtype))
        trace = self._folder / f"step-{self._first:08}-rank-{self._world.rank}.trace.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            self._profiler.export_chrome_trace(str(trace))
            trace.with_name(trace.name.replace(".trace.json.gz", ".json")).write_text(
                json.dumps(summary, indent=1) + "\n"
            )
        except OSError as error:
            self._display.warn(f"--profile: the trace could not be written: {error}")
        if self._world.is_main:
            self._say(summary, str(trace))
        del self._profiler

    def _summary(self, flops: int, peak: float) -> dict[str, Any]:
        """Return milliseconds per step of each part, rates, and the operators that take the most time."""
        events = list(self._profiler.events())
        num = self._num_steps
        optimizer = covered_us(each for each in events if each.name.startswith(_OPTIMIZER)) / 1e6
        inside = sum(self._parts.values())
        parts = {
            "data": self._parts[DATA],
            "forward pass": self._parts[FORWARD],
            "backward pass": self._parts[BACKWARD],
            "optimizer": optimizer,
            "waiting, clipping": max(0.0, self._parts[WAITING] - optimizer),
            "between steps": max(0.0, self._took - inside),
        }
        communication = covered_us(each for each in events if each.name.startswith(_COLLECTIVES)) / 1e6
        step_s = self._took / num
        device = self._world.device
        is_cuda = device.type == "cuda"
        operators = sorted(self._profiler.key_averages(), key=lambda each: -_self_us(each, is_cuda))[:_NUM_OPERATORS]
        return {
            "steps": [self._first, self._first + num - 1],
            "rank": self._world.rank,
            "ms": {name: seconds / num * 1e3 for name, seconds in parts.items()},
            "step_ms": step_s * 1e3,
            "communication_ms": communication / num * 1e3,
            "tokens_per_s": self._tokens / self._took,
            "samples_per_s": self._samples / self._took,
            "tflop": flops / 1e12,
            "tflops": flops / 1e12 / step_s,
            "matmul_tflops": peak,
            "known_peak_tflops": _known_peak(device),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if is_cuda else _peak_of_process(),
            "operators": [
                {"name": each.key, "calls": each.count / num, "ms": _self_us(each, is_cuda) / num / 1e3}
                for each in operators
            ],
        }

    def _say(self, summary: Mapping[str, Any], trace: str) -> None:
        whole = summary["step_ms"]

        def row(name: str, ms: float) -> tuple[str, str, str]:
            return name, f"{ms:.2f}", f"{ms / whole:.0%}"

        first, last = summary["steps"]
        steps = f"steps {first} to {last}" if last > first else f"step {first}"
        rows = [row(name, ms) for name, ms in summary["ms"].items()]
        rows.append(row("whole step", whole))
        rows.append(row("communication, also beside other work", summary["communication_ms"]))
        self._display.columns((f"{steps}, rank 0", "ms per step", "share"), rows)
        operators = [
            (each["name"][:60], f"{each['calls']:g}", f"{each['ms']:.2f}", f"{each['ms'] / whole:.0%}")
            for each in summary["operators"]
        ]
        self._display.columns(("operator, without those that it calls", "calls per step", "ms", "share"), operators)
        self._display.say(_rates(summary))
        self._display.say(f"trace (https://ui.perfetto.dev opens it): {trace}")


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many 10^12 operations per second a product of large matrices reaches on a device, as it is now."""
    one, other = (torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    end = time.perf_counter() + _MATMUL_S
    while time.perf_counter() < end or len(times) < 3:
        begun = time.perf_counter()
        torch.mm(one, other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return float(2 * _MATMUL_SIZE**3 / min(times) / 1e12)


def _rates(summary: Mapping[str, Any]) -> str:
    reached = summary["tflops"]
    tokens = f"{summary['tokens_per_s']:,.0f} tokens/s, " if summary["tokens_per_s"] else ""
    text = (
        f"{tokens}{summary['samples_per_s']:,.1f} samples/s; per rank "
        f"{summary['tflop']:.3g} TFLOP per step, {reached:.3g} TFLOP/s: {reached / summary['matmul_tflops']:.0%} of a "
        f"matrix product's {summary['matmul_tflops']:.3g} here"
    )
    if peak := summary["known_peak_tflops"]:
        text += f", {reached / peak:.0%} of the {peak:g} of this GPU in bf16 (MFU)"
    return f"{text}; peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB"


def covered_us(events: Iterable[Any]) -> float:
    """Return for how many microseconds at least one of some events goes on."""
    covered, until = 0.0, float("-inf")
    for begun, ended in sorted((each.time_range.start, each.time_range.end) for each in events):
        covered += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return covered


def _self_us(average: Any, is_cuda: bool) -> float:
    return float(average.self_device_time_total if is_cuda else average.self_cpu_time_total)


def _known_peak(device: torch.device) -> float:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in _PEAK_TFLOPS.items() if known in name), 0.0)


def _peak_of_process() -> int:
    """Return the most host memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
