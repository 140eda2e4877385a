"""What --exact costs: the time of a step, bytes between ranks and memory, beside the plain mode.

    python benchmarks/exact_cost.py                          # one rank
    torchrun --nproc_per_node 2 benchmarks/exact_cost.py     # two ranks on gloo

The work: a BERT of 6 layers, 384 wide (22.7 million parameters), with random weights and tokens, fused AdamW, a
clipped norm, two micro-batches of 8 x 128 tokens per rank and step, fp32, one thread. Arms are the strategies, plain
and exact, each with a model of its own. They take turns, in another order each round; ratios are medians of those
within a round. Bytes and memory follow from the number of parameters: of an exchange of gradients per step, and of
gradients with their sums.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from record import machine, versions, write_result
from torch import nn

from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.resolve import STRATEGIES
from shardlaunch.sharding.strategy import Settings, Strategy
from shardlaunch.sharding.world import World, connect, disconnect

MICRO_BATCHES, SAMPLES, LENGTH, VOCABULARY = 2, 8, 128, 30_522
PLAIN, EXACT = "plain", "exact"
BYTES = {PLAIN: 4, EXACT: 8}
MEMORY = {PLAIN: 4, EXACT: 12}


@dataclass(kw_only=True)
class Arm:
    """A strategy in one of the modes, and its seconds per step in each round."""

    strategy_name: str
    mode: str
    strategy: Strategy
    step_s: list[float] = field(default_factory=list)

    def step(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """Do a step on micro-batches, as the trainer does. All ranks."""
        while True:
            for number, batch in enumerate(batches):
                loss = self.strategy.replicas[0](**batch).loss
                self.strategy.backward(loss, factor=1 / MICRO_BATCHES, last=number == len(batches) - 1)
            if not self.strategy.must_repeat():
                break
        self.strategy.finish_gradients(unscale=1.0, max_norm=1.0)
        self.strategy.optimizer_step()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table. All ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of an arm in a round")
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = connect(read_environment(), needs_group=True)
    names = ["ddp", "fsdp2"] if world.size > 1 else ["single"]
    arms = [arm_of(name, mode, world) for name in names for mode in (PLAIN, EXACT)]
    generator = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(VOCABULARY, (MICRO_BATCHES, SAMPLES, LENGTH), generator=generator)
    batches = [{"input_ids": each, "labels": torch.arange(SAMPLES) % 2} for each in tokens]
    for round_number in range(arguments.rounds + 1):
        for arm in random.Random(round_number).sample(arms, len(arms)):
            if dist.is_initialized():
                dist.barrier()
            begun = time.perf_counter()
            for _ in range(arguments.steps):
                arm.step(batches)
            if round_number:  # the first one has no units, and compiles kernels
                arm.step_s.append((time.perf_counter() - begun) / arguments.steps)
    result = summary(arms, world)
    if world.is_main:
        show(result)
        if arguments.result:
            write_result(arguments.result, result)
    disconnect(world)


def arm_of(name: str, mode: str, world: World) -> Arm:
    """Return an arm with a model of its own."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    model: nn.Module = BertForSequenceClassification(config)
    values = {key: value.clone() for key, value in model.named_parameters()}

    def build_optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for _, parameter in parameters], lr=1e-5, fused=True)

    strategy = STRATEGIES[name](model, build_optimizer, world=world, settings=Settings(exact=mode == EXACT))
    if STRATEGIES[name].starts_empty:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.to_local().copy_(values[key].chunk(world.size)[world.rank])  # type: ignore[operator]
    model.train()
    return Arm(strategy_name=name, mode=mode, strategy=strategy)


def summary(arms: Sequence[Arm], world: World) -> dict[str, Any]:
    """Return the figures of this rank."""
    rows = []
    plain = {arm.strategy_name: arm.step_s for arm in arms if arm.mode == PLAIN}
    for arm in arms:
        ratios = [mine / its for mine, its in zip(arm.step_s, plain[arm.strategy_name], strict=True)]
        rows.append(
            {
                "arm": f"{arm.strategy_name}, {arm.mode}",
                "step_ms": [round(1000 * s, 1) for s in (statistics.median(arm.step_s), *_range(arm.step_s))],
                "over_plain": [round(ratio, 3) for ratio in (statistics.median(ratios), *_range(ratios))],
                "bytes_per_parameter_sent": BYTES[arm.mode] if world.size > 1 else 0,
                "bytes_per_parameter_of_gradients": MEMORY[arm.mode],
            }
        )
    return {
        "ranks": world.size,
        "rounds": len(arms[0].step_s),
        "arms": rows,
        "benchmark": "exact_cost",
        "note": "",
        "machine": machine(),
        "versions": versions("torch", "transformers"),
    }


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    for row in result["arms"]:
        step, least, most = row["step_ms"]
        over, least_over, most_over = row["over_plain"]
        print(
            f"{row['arm']:16} {step:8.1f} ms ({least:.1f} to {most:.1f}), {over:.2f} x plain ({least_over:.2f} to "
            f"{most_over:.2f})"
        )


if __name__ == "__main__":
    main()
