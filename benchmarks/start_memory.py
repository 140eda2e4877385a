"""Peak of host memory while a new sharded run starts, per process, beyond what it had before: the largest of its ranks.

    python benchmarks/start_memory.py                          # GPT-2 of 1.0 GB, on 2 and 4 ranks over gloo
    python benchmarks/start_memory.py --before ../before/src   # and the same with the package of another checkout

A start is building the model, spreading it and giving it its first weights, without data and steps. Weights are
pretrained (a folder that save_pretrained wrote, in fp32 and in bf16), or all drawn. Libraries are warm: each process
starts a tiny model first. "shard + module" is what a process may hold at once: its part of the fp32 weights, and the
largest module, which is made or gathered as a whole; "held" is what it has when it has started (DeepSpeed's ZeRO 3
then has its gradients and the optimizer's state too).
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import machine, versions, write_result

from shardlaunch import Options, Recipe
from shardlaunch.launcher.runs.assembly import Assembly, assemble
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS
from shardlaunch.sharding.world import World, connect, disconnect
from shardlaunch.text import pretrained_weights

KINDS = {"drawn": "all weights drawn", "fp32": "pretrained, stored in fp32", "bf16": "pretrained, stored in bf16"}
STRATEGIES = ("fsdp2", "zero3")
TINY = {"n_layer": 1, "n_embd": 64, "n_head": 4, "vocab_size": 1000}


def main() -> None:
    """Measure all cases, each in processes of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of 1024 features each")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--before", type=Path, help="the folder src of another checkout, to compare with")
    parser.add_argument("--result", default="", help="also write the figures to benchmarks/results/NAME.json")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    sizes = {"n_layer": args.layers, "n_embd": 1024, "n_head": 16}
    if args.case:
        _measure(*args.case, sizes)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in {*args.kinds} - {"drawn"}:
            _save(kind, sizes, Path(folder) / kind)
            _save(kind, TINY, Path(folder) / f"{kind}-tiny")
        cases = [(k, s, r) for s in args.strategies for k in args.kinds for r in args.ranks]
        for kind, strategy, num_ranks in cases:
            row = {"name": f"{KINDS[kind]}, {strategy}", "ranks": num_ranks}
            for arm, source in (("before", args.before), ("after", None)):
                if arm == "after" or source is not None:
                    found = _launched(kind, strategy, folder, args.layers, num_ranks, source)
                    row |= {"least": found["least"], "held": found["held"]}
                    row |= {arm: found["peak"], f"{arm}_cpu_s": found["cpu_s"]}
            rows.append(row)
            print(_described(row), flush=True)
            if args.result:
                write_result(args.result, _report(args, rows))


def _launched(
    kind: str, strategy: str, folder: str, layers: int, num_ranks: int, source: Path | None
) -> Mapping[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *launch, __file__, "--layers", str(layers), "--case", kind, strategy, folder]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if source is not None:
        environ["PYTHONPATH"] = str(source.resolve())
    output = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: Mapping[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def _save(kind: str, sizes: Mapping[str, int], folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.to(torch.bfloat16 if kind == "bf16" else torch.float32).save_pretrained(folder)


def _measure(kind: str, strategy: str, folder: str, sizes: Mapping[str, int]) -> None:
    """Start a tiny model, then the one that is measured; rank 0 prints the figures. All ranks."""
    torch.set_num_threads(1)
    world = connect(read_environment(), needs_group=True)
    _start(kind, strategy, Path(folder) / f"{kind}-tiny", TINY, world)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is needed now
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back (proc(5))
    before, begin = _status_bytes("VmRSS"), time.process_time()
    assembly = _start(kind, strategy, Path(folder) / kind, sizes, world)
    cpu_ms = int(1000 * (time.process_time() - begin))
    gc.collect()
    figures = torch.tensor([_status_bytes("VmHWM") - before, cpu_ms, _status_bytes("VmRSS") - before])
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    if world.is_main:
        largest = 4 * max(50257 * sizes["n_embd"], 4 * sizes["n_embd"] ** 2)
        least = 4 * assembly.num_elements // world.size + largest
        print(
            json.dumps(
                {"peak": int(figures[0]), "least": least, "held": int(figures[2]), "cpu_s": int(figures[1]) / 1000}
            )
        )
    disconnect(world)


def _start(kind: str, strategy: str, source: Path, sizes: Mapping[str, int], world: World) -> Assembly:
    class Measured(Recipe):
        options: Options

        def model(self) -> Any:
            from transformers import AutoModelForCausalLM, GPT2Config

            return AutoModelForCausalLM.from_config(GPT2Config(**sizes))

        def weights(self) -> Mapping[str, torch.Tensor]:
            from transformers import AutoModelForCausalLM

            return {} if kind == "drawn" else pretrained_weights(AutoModelForCausalLM, source)

    return assemble(
        Measured(Options()),
        world=world,
        strategy_name=strategy,
        settings=DEFAULT_SETTINGS,
        precision_name="fp32",
        run_digest=0,
        step=0,
        is_resumed=False,
    )


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _described(row: Mapping[str, Any]) -> str:
    arms = [
        f"{arm} {row[arm] / 1e6:.0f} MB ({row[arm] / row['least']:.2f} x, {row[f'{arm}_cpu_s']:.1f} CPU s)"
        for arm in ("before", "after")
        if arm in row
    ]
    needs = f"shard + module {row['least'] / 1e6:.0f} MB, held {row['held'] / 1e6:.0f} MB"
    return f"{row['name']}, {row['ranks']} ranks: {needs}, {', '.join(arms)}"


def _report(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "start_memory",
        "command": "python benchmarks/start_memory.py --before ../before/src",
        "ranks": max(args.ranks),
        "unit": "bytes of host memory per rank",
        "rows": rows,
        "versions": versions("torch", "transformers", "deepspeed"),
        "machine": machine(),
        "note": "",
    }


if __name__ == "__main__":
    main()
