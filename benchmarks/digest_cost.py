"""What --digest-every costs: the time of a digest of weights and optimizer, beside that of a step.

    python benchmarks/digest_cost.py                          # one rank
    torchrun --nproc_per_node 2 benchmarks/digest_cost.py     # two ranks on gloo

The work: a BERT of 6 layers, 384 wide (22.7 million parameters), with random weights and tokens, AdamW, one micro-batch
of 8 x 128 tokens per rank and step, fp32, one thread. Steps and digests take turns. Times are of the CPU, of rank 0.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from record import machine, versions, write_result

from shardlaunch.checkpoints.state_digests import digests_of_state
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.resolve import STRATEGIES
from shardlaunch.sharding.strategy import Strategy
from shardlaunch.sharding.world import World, connect, disconnect

SAMPLES, LENGTH, VOCABULARY = 8, 128, 30_522


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a line per strategy. All ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = connect(read_environment(), needs_group=True)
    names = ["ddp", "fsdp2"] if world.size > 1 else ["single"]
    result = {
        "ranks": world.size,
        "rounds": arguments.rounds,
        "arms": [measured(name, world, rounds=arguments.rounds) for name in names],
        "benchmark": "digest_cost",
        "note": "",
        "machine": machine(),
        "versions": versions("torch", "transformers"),
    }
    if world.is_main:
        for arm in result["arms"]:
            step, digest = arm["step_cpu_ms"][0], arm["digest_cpu_ms"][0]
            print(f"{arm['arm']:8} step {step:8.1f} ms of the CPU, digests {digest:6.1f} ms")
        if arguments.result:
            write_result(arguments.result, result)
    disconnect(world)


def measured(name: str, world: World, *, rounds: int) -> dict[str, Any]:
    """Return the times of steps and digests under a strategy. All ranks."""
    strategy = strategy_of(name, world)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(world.rank))
    step_s, digest_s = [], []
    for round_number in range(rounds + 1):
        begun = time.process_time()
        loss = strategy.replicas[0](input_ids=tokens, labels=torch.arange(SAMPLES) % 2).loss
        strategy.backward(loss, factor=1.0, last=True)
        strategy.finish_gradients(unscale=1.0, max_norm=1.0)
        strategy.optimizer_step()
        stepped = time.process_time()
        digests_of_state(strategy.state(), world.peers)
        if round_number:  # the first one compiles kernels
            step_s.append(stepped - begun)
            digest_s.append(time.process_time() - stepped)
    return {
        "arm": name,
        "bytes": sum(fragment.spec.num_bytes for fragment in strategy.state()),
        "step_cpu_ms": _figures(step_s),
        "digest_cpu_ms": _figures(digest_s),
    }


def strategy_of(name: str, world: World) -> Strategy:
    """Return a strategy with a model."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    values = {key: value.clone() for key, value in model.named_parameters()}

    def build_optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for _, parameter in parameters], lr=1e-5)

    strategy = STRATEGIES[name](model, build_optimizer, world=world)
    if STRATEGIES[name].starts_empty:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.to_local().copy_(values[key].chunk(world.size)[world.rank])  # type: ignore[operator]
    return strategy


def _figures(seconds: Sequence[float]) -> list[float]:
    """Return median, least and most in milliseconds."""
    return [round(1000 * s, 1) for s in (statistics.median(seconds), min(seconds), max(seconds))]


if __name__ == "__main__":
    main()
