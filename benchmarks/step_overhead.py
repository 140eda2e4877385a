"""Overhead of a training step, compared with a hand-written DDP loop that does the same work.

    python benchmarks/step_overhead.py                          # one rank
    torchrun --nproc_per_node 2 benchmarks/step_overhead.py     # two ranks on gloo

The work: a 784-128-64-10 perceptron (ReLU, cross-entropy, SGD), 64 random samples per rank and step, indexed from
tensors in memory in the same order, fp32, one micro-batch per rank, one thread, and the loss as a Python number in each
step. Ours is `Trainer.run` with its batches, strategy and hooks. It does more on purpose: it computes the gradient
norm, and on several ranks the loss and the counts over all ranks instead of its own (one raw arm there sums the loss
too). A run writes metrics.jsonl each step and TensorBoard every tenth step, as by default.

Every arm has its own model and starts from the same weights. The arms take turns in one process, in alternating order;
the first round is discarded, after a check that all arms reached the same weights. CPU time is that of this process
with all its threads (`time.process_time`); on several ranks, of rank 0 only. "over DDP" is the median difference from
the raw DDP loop within a round, which is less sensitive to a noisy machine than the medians.
"""

import argparse
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from record import machine, versions, write_result
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardlaunch import Options, Recipe, TensorData
from shardlaunch.checkpoints.records import Position
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.reporting.recorder import Recorder, StepReport
from shardlaunch.launcher.reporting.trackers import TrackedRun
from shardlaunch.launcher.training.batch_plan import BatchPlan
from shardlaunch.launcher.training.batches import Batches
from shardlaunch.launcher.training.trainer import Hooks, Trainer
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.precision import apply_precision
from shardlaunch.sharding.replicated import Replicated
from shardlaunch.sharding.world import World, available_cores, connect, disconnect

MICRO_BATCH = 64
STEPS_PER_EPOCH = 200
LR = 0.01  # small, so that rounding does not grow within the round that checks the weights
GOAL_US = 50.0
BASE = "raw loop, DDP"

Advance = Callable[[int, int], None]  # runs the steps [first, end)


class Perceptron(Recipe):
    """Train a perceptron on random tensors."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in parameters], lr=self.options.lr)


@dataclass(kw_only=True)
class Arm:
    """One loop to measure: its model, how to advance it, and the seconds per step of each round."""

    name: str
    model: nn.Module
    advance: Advance
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def measure(self, first: int, end: int) -> None:
        """Run the steps [first, end) and record their time. All ranks."""
        gc.collect()  # an arm pays for its own garbage only
        if dist.is_initialized():
            dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        self.advance(first, end)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self.cpu_s.append(cpu / (end - first))
        self.wall_s.append(wall / (end - first))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all arms share."""

    world: World
    recipe: Perceptron
    options: Options
    data: TensorData
    plan: BatchPlan
    weights: dict[str, torch.Tensor]
    num_steps: int

    def model(self) -> nn.Module:
        """Return a model with the initial weights of all arms."""
        model = self.recipe.model()
        model.load_state_dict(self.weights)
        return model

    def raw(self, name: str, *, use_ddp: bool, sum_loss: bool = False) -> Arm:
        """Return the hand-written loop. `sum_loss`: it sums the loss over all ranks, as ours does."""
        model = self.model()
        wrapped = DistributedDataParallel(model) if use_ddp else model
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        inputs, labels = self.data.columns["inputs"], self.data.columns["labels"]
        plan, offset = self.plan, self.world.rank * MICRO_BATCH

        def advance(first: int, end: int) -> None:
            order = torch.empty(0)
            wrapped.train()
            for step in range(first, end):
                epoch, position = divmod(step, STEPS_PER_EPOCH)
                if position == 0 or step == first:
                    order = torch.from_numpy(plan.order(epoch, 0, plan.num_samples))
                begin = position * plan.global_batch_size + offset
                rows = order[begin : begin + MICRO_BATCH]
                outputs = wrapped(inputs.index_select(0, rows))
                loss = F.cross_entropy(outputs, labels.index_select(0, rows))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if sum_loss:
                    loss = loss.detach() / self.world.size
                    dist.all_reduce(loss)
                assert math.isfinite(loss.item())

        return Arm(name=name, model=model, advance=advance)

    def ours(self, name: str, *, on_step: Callable[[int, StepReport], None]) -> Arm:
        """Return our loop, without evaluation and checkpoints."""
        world = self.world
        strategy = Replicated(self.model(), self.recipe.optimizer, world=world)
        batches = Batches(
            self.data,
            self.plan,
            collate=self.recipe.collate,
            num_targets=self.recipe.num_targets,
            num_tokens=self.recipe.num_tokens,
            rank=world.rank,
            num_ranks=world.size,
            training=True,
        )
        trainer = Trainer(
            self.recipe,
            self.options,
            strategy,
            batches,
            None,
            world=world,
            precision=apply_precision("fp32", world.device),
            num_steps=self.num_steps,
            hooks=Hooks(
                on_step=on_step,
                on_left_out=lambda step: None,
                on_evaluating=lambda done, total: None,
                on_evaluation=lambda step, results: None,
                save=lambda position: None,
            ),
        )
        position = Position()

        def advance(first: int, end: int) -> None:
            assert position.step == first
            trainer.run(position, end=end)

        return Arm(name=name, model=strategy.model, advance=advance)

    @contextmanager
    def run_hook(self, output_dir: Path, *, tracker: str) -> Iterator[Callable[[int, StepReport], None]]:
        """Yield the hook that a run calls after each step, with a progress view that prints to the null device."""
        output_dir.mkdir()
        display = Display(silent=not self.world.is_main)
        recorder = Recorder(
            display,
            log_every=self.options.log_every,
            track_every=self.options.track_every,
            steps_per_epoch=self.plan.steps_per_epoch,
            last_step=self.num_steps,
        )
        run = TrackedRun(project="bench", name="bench", tracking_id="bench", is_new=True, output_dir=output_dir)
        with open(os.devnull, "w") as nobody, ExitStack() as stack:
            if self.world.is_main:
                display.console = Console(file=nobody)
                trackers = [tracker] if tracker else []
                recorder.open(stack, run, trackers=trackers, step=0, end=self.num_steps, options={})
            yield recorder.on_step


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table. All ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds, after one that is discarded")
    parser.add_argument("--steps", type=int, default=300, help="steps per arm and round")
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    args = parser.parse_args(argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    world = connect(read_environment())
    PartialState(cpu=True)  # the trackers get the rank from it
    if not dist.is_initialized():  # needed by the raw DDP loop; ours does not use it on one rank
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        arms = _measure(world, Path(folder), rounds=args.rounds, steps=args.steps)
    if world.is_main:
        _print_table(arms, world, rounds=args.rounds, steps=args.steps)
        if args.result:
            write_result(args.result, _result(arms, world, rounds=args.rounds))
    disconnect(world)
    if dist.is_initialized():
        dist.destroy_process_group()


def _measure(world: World, folder: Path, *, rounds: int, steps: int) -> list[Arm]:
    torch.manual_seed(0)
    num_samples = STEPS_PER_EPOCH * MICRO_BATCH * world.size
    options = Options(global_batch_size=MICRO_BATCH * world.size, micro_batch_size=MICRO_BATCH, lr=LR)
    recipe = Perceptron(options)
    bench = Bench(
        world=world,
        recipe=recipe,
        options=options,
        data=TensorData(inputs=torch.randn(num_samples, 784), labels=torch.randint(10, (num_samples,))),
        plan=BatchPlan(
            num_samples=num_samples,
            global_batch_size=options.global_batch_size,
            micro_batch_size=options.micro_batch_size,
            seed=0,
        ),
        weights=recipe.model().state_dict(),
        num_steps=(rounds + 1) * steps + 1,  # one more, so that no round ends the run
    )
    with (
        bench.run_hook(folder / "log", tracker="") as log,
        bench.run_hook(folder / "log_and_tensorboard", tracker="tensorboard") as log_and_tensorboard,
    ):
        arms = [
            bench.raw(BASE, use_ddp=True),
            bench.ours("ours, hooks do nothing", on_step=lambda step, report: None),
            bench.ours("ours, metrics.jsonl", on_step=log),
            bench.ours("ours, metrics.jsonl and TensorBoard", on_step=log_and_tensorboard),
        ]
        if world.size == 1:
            arms.insert(0, bench.raw("raw loop, no DDP", use_ddp=False))
        else:
            arms.insert(1, bench.raw("raw loop, DDP, loss over all ranks", use_ddp=True, sum_loss=True))
        for number in range(rounds + 1):
            for arm in arms if number % 2 else reversed(arms):
                arm.measure(number * steps, (number + 1) * steps)
            if number == 0:
                _check_same_weights(arms)
    return arms


def _check_same_weights(arms: Sequence[Arm]) -> None:
    """Check that all arms have the same weights, up to rounding."""
    expected = arms[0].model.state_dict()
    for arm in arms[1:]:
        for name, weight in arm.model.state_dict().items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def _print_table(arms: Sequence[Arm], world: World, *, rounds: int, steps: int) -> None:
    print(f"machine  {machine()['cpu']}, {available_cores()} of them here, Python {machine()['python']}")
    print(f"torch    {torch.__version__}, {torch.get_num_threads()} thread, {world.size} rank(s), figures of rank 0")
    print(f"figures  microseconds per step, median [least, most] of {rounds} rounds of {steps} steps\n")
    base = next(arm for arm in arms if arm.name == BASE)
    width = max(len(arm.name) for arm in arms)
    print(f"{'':{width}}  {'CPU':>20}  {'wall':>20}  {'CPU over DDP':>20}")
    for arm in arms:
        over = _cell(_over(arm, base)) if arm is not base else ""
        cells = (_cell(arm.cpu_s[1:]), _cell(arm.wall_s[1:]), over)
        print(f"{arm.name:{width}}  " + "  ".join(f"{cell:>20}" for cell in cells))
    print(f"\ngoal: ours at most {GOAL_US:.0f} microseconds of CPU over the raw DDP loop")


def _result(arms: Sequence[Arm], world: World, *, rounds: int) -> dict[str, Any]:
    """Return what benchmarks/tables.py reads: CPU time of each arm, and of ours over the raw DDP loop."""
    base = next(arm for arm in arms if arm.name == BASE)
    figures = {arm.name: arm.cpu_s[1:] for arm in arms}
    figures |= {f"{arm.name}: over DDP": _over(arm, base) for arm in arms if arm.name.startswith("ours")}
    return {
        "benchmark": "step_overhead",
        "command": f"{'python' if world.size == 1 else f'torchrun --nproc_per_node {world.size}'} "
        f"benchmarks/step_overhead.py",
        "ranks": world.size,
        "unit": "microseconds of CPU per step",
        "rounds": rounds,
        "rows": [
            {"name": name, **dict(zip(("median", "least", "most"), map(round, _microseconds(seconds)), strict=True))}
            for name, seconds in figures.items()
        ],
        "versions": versions("torch"),
        "machine": machine(),
        "note": "",
    }


def _over(arm: Arm, base: Arm) -> list[float]:
    """Return by how many seconds per step an arm exceeds the base, round by round."""
    return [ours - raw for ours, raw in zip(arm.cpu_s[1:], base.cpu_s[1:], strict=True)]


def _cell(seconds: Sequence[float]) -> str:
    middle, least, most = _microseconds(seconds)
    return f"{middle:.0f} [{least:.0f}, {most:.0f}]"


def _microseconds(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and most."""
    return 1e6 * statistics.median(seconds), 1e6 * min(seconds), 1e6 * max(seconds)


if __name__ == "__main__":
    main()
