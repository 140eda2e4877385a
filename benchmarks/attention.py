"""What attention with dropout costs on the CPU: a step with shardlaunch's, beside PyTorch's.

    python benchmarks/attention.py

The work: forward and backward pass of a BERT of 6 layers, 384 wide, 12 heads, dropout 0.1, on random tokens, 4,096 per
step in rows of one length, fp32, one thread. Arms: attention as a run has it by default, PyTorch's (--attention plain),
and PyTorch's without dropout in the attention, which has a fused kernel, for comparison. They take turns, in another
order each round; CPU time of the process; ratios are medians of those within a round.
"""

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from record import machine, spread, versions, write_result
from transformers import BertConfig, BertForSequenceClassification

from shardlaunch import Options
from shardlaunch.launcher.training.attention import faster_attention

VOCABULARY = 30_522
OURS, PLAIN, NONE = "ours", "plain", "no dropout of attention"
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="per step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    models = {arm: _model(0.0 if arm == NONE else 0.1) for arm in (OURS, PLAIN, NONE)}
    rows = []
    for length in arguments.lengths:
        times: dict[str, list[float]] = {arm: [] for arm in models}
        for round_number in range(arguments.rounds + 1):
            for arm in random.Random(round_number).sample(list(models), len(models)):
                took = _step(models[arm], arguments.tokens // length, length, is_ours=arm == OURS)
                if round_number:
                    times[arm].append(took)
        rows.append({"length": length, **_figures(times)})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.result:
        result = {
            "benchmark": "attention",
            "rounds": arguments.rounds,
            "rows": rows,
            "note": "",
            "machine": machine(),
            "versions": versions("torch", "transformers"),
        }
        write_result(arguments.result, result)


def _model(attention_dropout: float) -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=VOCABULARY,
        attention_probs_dropout_prob=attention_dropout,
    )
    torch.manual_seed(0)
    return BertForSequenceClassification(config).train()


def _step(model: BertForSequenceClassification, rows: int, length: int, *, is_ours: bool) -> float:
    tokens = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    with faster_attention(Options(attention="auto" if is_ours else "plain"), CPU):
        begun = time.process_time()
        model(input_ids=tokens, labels=torch.arange(len(tokens)) % 2).loss.backward()
        took = time.process_time() - begun
    model.zero_grad()
    return took


def _figures(times: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [plain / ours for plain, ours in zip(times[PLAIN], times[OURS], strict=True)]
    return {"ms": {arm: spread([1000 * s for s in its], 0) for arm, its in times.items()}, "gain": spread(ratios, 2)}


if __name__ == "__main__":
    main()
