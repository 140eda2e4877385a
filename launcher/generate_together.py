"""Generation by Hugging Face models, also while the model is in slices."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method


def generate(model: Any, **options: Any) -> torch.Tensor:
    """Return `model.generate(**options)`: token ids, a row a sample. All ranks, each with samples of its own.

    Where modules are gathered as they run, every rank must run them as often as the others: ranks whose samples are
    done go on until all are.
    """
    if "generate" not in vars(model):  # it runs the encoder before the model itself; nothing to do but under FSDP2
        register_fsdp_forward_method(model, "generate")
    is_shared = dist.is_initialized() and dist.get_world_size() > 1
    generated: torch.Tensor = model.generate(**options, synced_gpus=is_shared)
    return generated
