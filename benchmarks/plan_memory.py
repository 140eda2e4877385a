"""Published peaks of GPU memory beside what the ledger of `shardlaunch plan` computes for the same options.

    python benchmarks/plan_memory.py --result plan_memory

torchtitan and torchtune train their own way (weights in bf16, selective checkpointing, the optimizer in the backward
pass), which no recipe here does: the steps below follow their options, and only the ledger and the GPU kernels are
those of `shardlaunch plan`. Nothing runs on a GPU. Sources: benchmarks/llama3_h100_202412_torchtitan.md of
pytorch/torchtitan and its code at 9dec370, whose logs show reserved memory, and README.md of pytorch/torchtune, which
shows active memory.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from record import versions, write_result
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from shardlaunch.launcher.planning.allocator import reserved_bytes
from shardlaunch.launcher.planning.gpu_kernels import gpu_kernels
from shardlaunch.launcher.planning.ledger import Ledger
from shardlaunch.launcher.planning.memory import peak_of
from shardlaunch.launcher.planning.simulation import cheap_chunks

GIB = 1 << 30
SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
PRODUCTS_PER_LAYER = 7
STEPS = 3  # the second's blocks still find gaps that the first step's optimizer has cut
_aten = torch.ops.aten
_SAVED = {
    _aten.mm.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published peak, and the options behind it."""

    name: str
    published_gib: float
    size: str
    tokens: int
    """Per sample; there are two samples per micro-batch."""
    ranks: int = 1
    checkpointing: str = ""
    """selective (torchtitan's policy of operations), full, or none."""
    chunks: int = 1
    """Parts that the loss is computed in."""
    updates_in_backward: bool = False
    optimizer: str = "adamw"
    """adamw, or paged: what bitsandbytes keeps outside of PyTorch's memory."""
    is_compiled: bool = False
    """Compiled. torchtune: norms, the gate's activation and the loss are taken as recomputed from what products and
    attention keep anyway, their inputs. torchtitan, whose policy says what is kept: what no backward pass uses is not.
    """
    has_expandable_segments: bool = False
    """As run_llama_train.sh of torchtitan sets for one machine; its script for several (Slurm) does not."""
    not_counted: str = ""
    """What the published run did besides, and the plan does not know."""


_TUNE = "torchtune Llama 3.2 3B"
ROWS = (
    Row(
        name="torchtitan 8B, 8 GPUs",
        published_gib=82.4,
        size="8B",
        tokens=8192,
        ranks=8,
        checkpointing="selective",
        has_expandable_segments=True,
    ),
    Row(
        name="torchtitan 8B, 8 GPUs, compiled",
        published_gib=77.0,
        size="8B",
        tokens=8192,
        ranks=8,
        checkpointing="selective",
        has_expandable_segments=True,
        is_compiled=True,
        not_counted="fused operations",
    ),
    Row(
        name="torchtitan 8B, 8 GPUs, compiled, float8",
        published_gib=76.8,
        size="8B",
        tokens=8192,
        ranks=8,
        checkpointing="selective",
        has_expandable_segments=True,
        is_compiled=True,
        not_counted="fused operations, float8",
    ),
    Row(
        name="torchtitan 8B, 128 GPUs", published_gib=67.0, size="8B", tokens=8192, ranks=128, checkpointing="selective"
    ),
    Row(
        name="torchtitan 8B, 128 GPUs, compiled",
        published_gib=62.0,
        size="8B",
        tokens=8192,
        ranks=128,
        checkpointing="selective",
        is_compiled=True,
        not_counted="fused operations",
    ),
    Row(
        name="torchtitan 8B, 128 GPUs, compiled, float8",
        published_gib=61.8,
        size="8B",
        tokens=8192,
        ranks=128,
        checkpointing="selective",
        is_compiled=True,
        not_counted="fused operations, float8",
    ),
    Row(
        name="torchtune Llama 3.1 8B, memory-saving",
        published_gib=18.9,
        size="8B",
        tokens=2048,
        checkpointing="full",
        chunks=8,
        updates_in_backward=True,
        optimizer="paged",
        is_compiled=True,
    ),
    Row(name=f"{_TUNE}, packed", published_gib=60.0, size="3B", tokens=4096),
    Row(name=f"{_TUNE}, compiled", published_gib=51.0, size="3B", tokens=4096, is_compiled=True),
    Row(name=f"{_TUNE}, chunked loss", published_gib=42.9, size="3B", tokens=4096, chunks=8, is_compiled=True),
    Row(
        name=f"{_TUNE}, checkpointing",
        published_gib=24.9,
        size="3B",
        tokens=4096,
        chunks=8,
        checkpointing="full",
        is_compiled=True,
    ),
    Row(
        name=f"{_TUNE}, update in backward",
        published_gib=23.1,
        size="3B",
        tokens=4096,
        chunks=8,
        checkpointing="full",
        updates_in_backward=True,
        is_compiled=True,
    ),
)
OMITTED = {
    "torchtitan 70B, 256 GPUs (71.9, 67.6)": "tensor parallelism over 8 GPUs, which no strategy here has",
    "torchtune 3B, not packed (25.5)": "the lengths of its samples are not published",
    "torchtune 3B, activations offloaded (21.8), 8-bit AdamW (17.6)": "neither is here",
}


def model_of(row: Row) -> nn.Module:
    """Return a Llama on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations import sdpa_attention

    sdpa_attention.use_gqa_in_sdpa = lambda *_, **__: False  # both repeat keys and values for the heads that share them
    config = LlamaConfig(
        **SIZES[row.size],
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=row.size == "3B",
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    for layer in model.model.layers:
        if row.checkpointing:
            layer.forward = partial(_checkpointed, layer.forward, _context_of(row))
        elif row.is_compiled:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.forward = partial(_checkpointed, norm.forward, {})
            layer.mlp.forward = partial(_fused_mlp, layer.mlp)
    return model


def _fused_mlp(mlp: Any, inputs: torch.Tensor) -> torch.Tensor:
    activated = _checkpointed(lambda gate, up: mlp.act_fn(gate) * up, {}, mlp.gate_proj(inputs), mlp.up_proj(inputs))
    result: torch.Tensor = mlp.down_proj(activated)
    return result


def _checkpointed(forward: Callable[..., Any], context: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, **context, **kwargs
    )


def _context_of(row: Row) -> dict[str, Any]:
    return {"context_fn": partial(_selective, row.is_compiled)} if row.checkpointing == "selective" else {}


def _selective(is_compiled: bool) -> Any:
    """Save what takes long to compute, but every second product, as torchtitan does.

    No backward pass uses the result of a layer's last product: what runs operation by operation keeps it nevertheless.
    """
    counts: dict[bool, int] = defaultdict(int)

    def policy(ctx: Any, func: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if func is _aten.mm.default:
            counts[ctx.is_recompute] += 1
        number = counts[ctx.is_recompute]
        is_unused = is_compiled and number == PRODUCTS_PER_LAYER
        is_left_out = func is _aten.mm.default and (number % 2 == 0 or is_unused)
        is_saved = func in _SAVED and not is_left_out
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@cache
def peak_gib(row: Row) -> float:
    """Return the computed peak: of reserved memory for torchtitan, of active memory for torchtune."""
    model = model_of(row)
    ledger = Ledger()
    with _ranks(row.ranks), gpu_kernels(), ledger.noting():
        if row.ranks > 1:
            _shard(model, row.ranks)
            model.to_empty(device="cpu")
        else:
            _place(model, ledger)
        _fill_rotary(model, ledger)
        update = _updater(model, row)
        samples = torch.ones(2, row.tokens, dtype=torch.int64)
        for _ in range(STEPS):
            _loss_and_backward(model, samples, row)
            update()
    if row.ranks > 1:
        return reserved_bytes(ledger.events, ledger.streams, is_expandable=row.has_expandable_segments) / GIB
    return peak_of(ledger.events) / GIB


def _loss_and_backward(model: nn.Module, samples: torch.Tensor, row: Row) -> None:
    loss = partial(_checkpointed, _loss, {}) if row.is_compiled and row.checkpointing != "selective" else _loss
    if row.chunks == 1:
        logits = model(input_ids=samples).logits
        total = loss(logits, samples)
        del logits
        total.backward()
        return
    hidden = model.model(input_ids=samples).last_hidden_state
    # torchtune's chunks: the products are kept as they are, in bf16, and each part is widened for its loss.
    parts = [model.lm_head(part) for part in hidden.chunk(row.chunks, dim=1)]
    losses = [loss(part, labels) for part, labels in zip(parts, samples.chunk(row.chunks, dim=1), strict=True)]
    del parts
    torch.stack(losses).sum().backward()


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def _updater(model: nn.Module, row: Row) -> Callable[[], None]:
    """Return what updates the weights after a backward pass."""
    parameters = list(model.parameters())
    if row.optimizer == "paged":
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(_drop)
        return lambda: None
    if row.updates_in_backward:
        for parameter in parameters:
            optimizer = torch.optim.AdamW([parameter], fused=True)
            parameter.register_post_accumulate_grad_hook(partial(_update_one, optimizer))
        return lambda: None
    # torchtitan leaves it to PyTorch, which takes lists of tensors then.
    whole = torch.optim.AdamW(parameters, foreach=row.ranks > 1, fused=row.ranks == 1)

    def update() -> None:
        if row.ranks > 1:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        whole.step()
        whole.zero_grad()

    return update


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _update_one(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    optimizer.step()
    parameter.grad = None


def _shard(model: nn.Module, ranks: int) -> None:
    with _disable_current_modes(), cheap_chunks():
        mesh = init_device_mesh("cpu", (ranks,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        layers = list(model.model.layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=layer is not layers[-1])
        fully_shard(model, mesh=mesh, mp_policy=policy)


def _place(model: nn.Module, ledger: Ledger) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(ledger.fake(parameter.bfloat16()))
                module._parameters[name] = made[id(parameter)]


def _fill_rotary(model: nn.Module, ledger: Ledger) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = ledger.fake(torch.empty(buffer.shape, dtype=buffer.dtype, device="meta"))


@contextmanager
def _ranks(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Compute all rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--result", default="", help="write benchmarks/results/NAME.json")
    parser.add_argument("--only", default="", help="rows with this text in their name")
    arguments = parser.parse_args()
    found = []
    for row in ROWS:
        if arguments.only not in row.name:
            continue
        begun = time.process_time()
        computed = peak_gib(replace(row, name="", published_gib=0.0, not_counted=""))  # once for equal options
        error = computed / row.published_gib - 1
        found.append(
            {
                "name": row.name,
                "published_gib": row.published_gib,
                "computed_gib": round(computed, 1),
                "error": round(error, 3),
                "not_counted": row.not_counted,
                "cpu_s": round(time.process_time() - begun, 1),
            }
        )
        print(found[-1], flush=True)
    errors = [abs(each["error"]) for each in found]
    print(f"median {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    if arguments.result:
        result = {"rows": found, "omitted": OMITTED, "versions": versions("torch", "transformers")}
        print(f"written: {write_result(arguments.result, result)}")


if __name__ == "__main__":
    main()
