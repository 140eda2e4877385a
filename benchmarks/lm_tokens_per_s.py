"""Tokens per second of a language model in training, with this project and with others.

    python benchmarks/lm_tokens_per_s.py --data FILE      # a text of a megabyte or more

A GPT of 4 layers, 256 wide, a vocabulary of about 8,192, on blocks of 256 tokens: 16 blocks per step on 2 ranks of the
CPU with a thread each, fp32, AdamW, dropout 0.1 but none in the attention. Arms: `shardlaunch run gpt_lm`, which cuts
the text into blocks, with and without --chunked-loss; a loop written by hand with DDP and a GPT of plain PyTorch; the
Trainer with GPT-2 of transformers; both of these on random tokens. The first 4 of 16 steps do not count. Arms take
turns, in another order each round; ratios are medians of those within a round, to the loop written by hand.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm import sizes
from record import machine, spread, versions, write_result

HERE = Path(__file__).resolve().parent
SHARDLAUNCH = str(Path(sys.executable).parent / "shardlaunch")
CHUNKED, OURS, LOOP, TRAINER = "shardlaunch, --chunked-loss", "shardlaunch", "loop by hand, DDP", "Trainer"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(argv)
    found: dict[str, list[float]] = {arm: [] for arm in (CHUNKED, OURS, LOOP, TRAINER)}
    with tempfile.TemporaryDirectory() as name:
        for round_number in range(arguments.rounds):
            for arm in random.Random(round_number).sample(list(found), len(found)):
                output = Path(name) / f"{round_number}-{len(arm)}"
                found[arm].append(_tokens_per_s(_words(arm, arguments.data, output), output))
                print(f"{arm}: {found[arm][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    rows = [_row(arm, found) for arm in found]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.result:
        result = {"benchmark": "lm_tokens_per_s", "rounds": arguments.rounds, "rows": rows, "note": ""}
        result |= {"machine": machine(), "versions": versions("torch", "transformers", "accelerate")}
        write_result(arguments.result, result)


def _words(arm: str, data: str, output: Path) -> list[str]:
    if arm in (LOOP, TRAINER):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        script = "with_loop.py" if arm == LOOP else "with_trainer.py"
        return [*torchrun, "--nproc-per-node", str(sizes.RANKS), str(HERE / "lm" / script)]
    options = {
        **{"data": data, "vocab-size": sizes.VOCABULARY, "context-length": sizes.CONTEXT, "layers": sizes.LAYERS},
        **{"heads": sizes.HEADS, "width": sizes.WIDTH, "dropout": sizes.DROPOUT, "lr": sizes.LEARNING_RATE},
        **{"global-batch-size": sizes.BATCH_SIZE, "micro-batch-size": sizes.MICRO_BATCH_SIZE},
        **{"max-steps": sizes.STEPS, "save-every": 0, "output-dir": output},
        **{"callback": f"{HERE / 'lm' / 'callback.py'}:Speed"},
    }
    words = [SHARDLAUNCH, "run", "gpt_lm", "--ranks", str(sizes.RANKS), "--"]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*words, "--chunked-loss"] if arm == CHUNKED else words


def _tokens_per_s(words: Sequence[str], output: Path) -> float:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"OUTPUT_DIR": str(output), "HF_HOME": str(output.parent / "home"), "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), str(HERE / "lm")])
    ended = subprocess.run(words, env=env, capture_output=True, text=True)
    told = [line for line in ended.stdout.splitlines() if line.startswith('{"tokens_per_s"')]
    if ended.returncode or not told:
        raise SystemExit(f"{' '.join(words)} failed:\n{ended.stderr[-3000:]}")
    speed: float = json.loads(told[-1])["tokens_per_s"]
    return speed


def _row(arm: str, found: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [its / loop for its, loop in zip(found[arm], found[LOOP], strict=True)]
    return {"arm": arm, "tokens_per_s": spread(found[arm], 0), "over_loop": spread(ratios, 2)}


if __name__ == "__main__":
    main()
