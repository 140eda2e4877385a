"""Generation with Hugging Face models, including sharded ones."""

from typing import Any

import torch
import torch.distributed as dist

from shardlaunch.errors import UserError

_BEAM_SETTINGS = ("early_stopping", "length_penalty")


def set_search(model: Any, *, num_beams: int, most: tuple[str, int]) -> None:
    """Set a model's generation config to beam search; keep its other settings.

    `most`: an option and the number of new tokens that it allows. Settings for sampling are removed, and with one beam
    those of beams: transformers refuses to save settings without effect. Raises UserError for contradictory settings.
    """
    generation, (flag, max_new_tokens) = model.generation_config, most
    if (generation.min_length or 0) > max_new_tokens:
        raise UserError(
            f"{flag} {max_new_tokens}: this model generates at least {generation.min_length} tokens (min_length in its "
            f"generation_config.json)"
        )
    unused = ("temperature", "top_k", "top_p", "min_p", "typical_p", *(_BEAM_SETTINGS if num_beams == 1 else ()))
    generation.update(num_beams=num_beams, max_new_tokens=max_new_tokens, do_sample=False, **dict.fromkeys(unused))
    try:
        generation.validate(strict=True)  # as when a checkpoint is saved
    except ValueError as error:
        raise UserError(f"--model: invalid generation_config.json: {' '.join(str(error).split())}") from error


def generate(model: Any, **options: Any) -> torch.Tensor:
    """Return `model.generate(**options)`: token ids, one row per sample. All ranks, each with its own samples.

    If modules are gathered as they run, all ranks must run them equally often, so ranks that are done continue until
    all are done.
    """
    if "generate" not in vars(model):  # generate() calls the encoder directly; has an effect under FSDP2 only
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "generate")
    is_shared = dist.is_initialized() and dist.get_world_size() > 1
    generated: torch.Tensor = model.generate(**options, synced_gpus=is_shared)
    return generated
