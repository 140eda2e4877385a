"""Generation by Hugging Face models, also while the model is in slices."""

from typing import Any

import torch
import torch.distributed as dist

from shardlaunch.errors import UserError

_OF_BEAMS = ("early_stopping", "length_penalty")


def set_search(model: Any, *, num_beams: int, most: tuple[str, int]) -> None:
    """Let a model write texts by a search of so many beams, with settings of its own for all else.

    `most`: an option and how many tokens it allows. Settings for draws at random go, and those of beams where there is
    one only: transformers refuses to save what would have no effect. Raises UserError for settings that contradict.
    """
    generation, (flag, max_new_tokens) = model.generation_config, most
    if (generation.min_length or 0) > max_new_tokens:
        raise UserError(
            f"{flag} {max_new_tokens}: this model writes at least {generation.min_length} tokens (min_length in its "
            f"generation_config.json)"
        )
    idle = ("temperature", "top_k", "top_p", "min_p", "typical_p", *(_OF_BEAMS if num_beams == 1 else ()))
    generation.update(num_beams=num_beams, max_new_tokens=max_new_tokens, do_sample=False, **dict.fromkeys(idle))
    try:
        generation.validate(strict=True)  # as it will be when a checkpoint is saved
    except ValueError as error:
        raise UserError(f"--model: its generation_config.json: {' '.join(str(error).split())}") from error


def generate(model: Any, **options: Any) -> torch.Tensor:
    """Return `model.generate(**options)`: token ids, a row a sample. All ranks, each with samples of its own.

    Where modules are gathered as they run, every rank must run them as often as the others: ranks whose samples are
    done go on until all are.
    """
    if "generate" not in vars(model):  # it runs the encoder before the model itself; nothing to do but under FSDP2
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "generate")
    is_shared = dist.is_initialized() and dist.get_world_size() > 1
    generated: torch.Tensor = model.generate(**options, synced_gpus=is_shared)
    return generated
