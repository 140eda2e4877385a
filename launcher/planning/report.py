"""How plans are shown: a table and what was assumed, or one JSON document."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from shardlaunch.launcher.options import Options
from shardlaunch.launcher.planning.cluster import GIB, TFLOPS, Cluster
from shardlaunch.launcher.planning.plans import Plan, Subject, option_words

VERSION = 1


def table_of(plans: Sequence[Plan], cluster: Cluster) -> Table:
    """Return a row per strategy that a run could have."""
    planned = [(plan, plan.memory) for plan in plans if plan.memory is not None]
    size, unit = _unit_of(max(memory.peak for _, memory in planned) / 10)
    title = f"{unit} per rank, {_ranks_text(cluster)}, GPUs of {cluster.gpu_gib:g} GiB"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("params", "grads", "optimizer", "activations", "peak", "fits", "sent/step", "time/step", "host")
    table.add_column("strategy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for plan, memory in planned:
        parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.peak)
        table.add_row(
            plan.strategy,
            *(f"{part / size:,.2f}" for part in parts),
            "yes" if plan.fits else "no",
            f"{plan.wire_bytes / size:,.2f}",
            time_text(plan.step_s),
            f"{plan.host_bytes / size:,.2f}",
        )
    return table


def lines_of(
    subject: Subject, cluster: Cluster, plans: Sequence[Plan], best: Plan | None, suggestion: Plan | None
) -> Iterator[str]:
    """Yield what follows from the plans, and what they assume."""
    for plan in plans:
        if plan.memory is None:
            yield f"{plan.strategy}: not planned: {plan.problem}"
    saved = next((plan for plan in plans if plan.memory is not None), None)
    if saved is not None:
        yield (
            f"one checkpoint: {bytes_text(saved.save_bytes)}, written in {time_text(saved.save_s)} at "
            f"{cluster.disk_gbps:g} GB/s"
        )
    if best is not None:
        yield f"fastest that fits: {best.strategy}, {rate_text(subject.options, best)}"
        if best.memory is not None:
            yield (
                f"PyTorch's allocator takes {bytes_text(best.memory.reserved)} for {bytes_text(best.memory.peak)} at "
                f"the peak: gaps between blocks, which it gives back when memory is short"
            )
    else:
        yield "nothing fits"
    if suggestion is not None and suggestion.memory is not None:
        yield (
            f"fits: {suggestion.strategy} with {option_words(suggestion.changes)}: peak "
            f"{bytes_text(suggestion.memory.peak)}, {rate_text(subject.options, suggestion)}"
        )
    elif best is None and saved is not None:
        yield "nor does gradient checkpointing with smaller micro-batches or --cpu-offload: take more ranks"


def assumptions(subject: Subject, cluster: Cluster, batch: str) -> Iterator[str]:
    """Yield what the plans assume."""
    options = subject.options
    yield f"batch: {batch}; {options.micro_batch_size} samples per micro-batch, {options.global_batch_size} per step"
    yield (
        "attention: PyTorch's scaled_dot_product_attention is counted as a fused kernel, which keeps no probabilities; "
        "attention that a model computes itself is counted as it is"
    )
    yield (
        f"memory: tensors in blocks of 512 bytes; {cluster.reserve_gib:g} GiB are left for CUDA, NCCL, workspaces and "
        f"gaps (--reserve)"
    )
    tflops = cluster.tflops or TFLOPS[subject.precision_name]
    yield (
        f"speed: {tflops:g} TFLOP/s reached per GPU (--tflops), {cluster.node_gbps:g} GB/s per GPU within a machine "
        f"(--node-bandwidth), {cluster.network_gbps:g} between machines (--network-bandwidth); what small kernels "
        f"take to start is not counted"
    )
    yield "host: of one machine, what is offloaded and the copy of a save that is written beside the training"
    if options.compile:
        yield "--compile: not counted; compiled models usually need less"
    if subject.precision_name == "fp8":
        yield "--precision fp8: memory is counted as bf16's"


def document(
    subject: Subject,
    cluster: Cluster,
    plans: Sequence[Plan],
    best: Plan | None,
    suggestion: Plan | None,
    *,
    recipe: str,
    batch: str,
) -> dict[str, Any]:
    """Return all of it for --json. Bytes and seconds."""
    return {
        "version": VERSION,
        "recipe": recipe,
        "cluster": asdict(cluster),
        "precision": subject.precision_name,
        "micro_batch_size": subject.options.micro_batch_size,
        "global_batch_size": subject.options.global_batch_size,
        "assumed": list(assumptions(subject, cluster, batch)),
        "strategies": [asdict(plan) for plan in plans],
        "fastest": best.strategy if best is not None else None,
        "suggestion": asdict(suggestion) if suggestion is not None else None,
    }


def rate_text(options: Options, plan: Plan) -> str:
    """Return the estimated time of a step and what it gets done."""
    return f"about {time_text(plan.step_s)} per step, {options.global_batch_size / plan.step_s:,.0f} samples/s"


def _unit_of(num_bytes: float) -> tuple[int, str]:
    """Return the unit to show sizes up to this one in."""
    return (GIB, "GiB") if num_bytes >= GIB / 10 else (1 << 20, "MiB")


def bytes_text(num_bytes: float) -> str:
    """Return a size in binary units, as memory is sold."""
    size, unit = _unit_of(num_bytes)
    return f"{num_bytes / size:,.1f} {unit}"


def time_text(seconds: float) -> str:
    """Return a time with two or three digits."""
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _ranks_text(cluster: Cluster) -> str:
    nodes = cluster.num_nodes
    ranks = f"{cluster.ranks:,} rank{'s' * (cluster.ranks > 1)}"
    return f"{ranks} on {nodes:,} machine{'s' * (nodes > 1)}"
