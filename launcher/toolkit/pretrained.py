"""Hugging Face models, configurations and tokenizers from a hub id or a local folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xxhash
from torch import nn

from shardlaunch.errors import UserError


def from_source(auto_class: Any, source: str | Path, *, flag: str = "--model", **options: Any) -> Any:
    """Return `auto_class.from_pretrained(source)`. Raises UserError with what else to use when that fails.

    `flag` is the option that names the source.
    """
    path = Path(source)
    needed = "tokenizer.json" if flag == "--tokenizer" else "config.json"
    if path.is_file() or (path.is_dir() and not (path / needed).exists()):
        raise UserError(f"{flag} {source}: not a {flag.strip('-')} folder: there is no {needed} in it")
    try:
        return auto_class.from_pretrained(source, **options)
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f'{flag} {source}: a package is missing ({reason}): pip install "shardlaunch[text]"') from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if path.is_dir():
            raise UserError(f"{flag} {source}: not a {flag.strip('-')} folder: {reason}") from error
        raise UserError(
            f"{flag} {source}: neither a local folder nor to be had from the hub ({reason}). "
            f"Give a local folder, or use --preset demo, which needs no hub."
        ) from error


def from_config(auto_class: Any, config: Any, source: str | Path) -> Any:
    """Return `auto_class.from_config(config)` in fp32. Raises UserError when it has no such model."""
    try:
        return auto_class.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UserError(
            f"--model {source}: a {config.model_type} does not do for this recipe: it is no "
            f"{auto_class.__name__.removeprefix('AutoModelFor')} model"
        ) from error


def pretrained_weights(auto_class: Any, source: str | Path, **options: Any) -> Mapping[str, torch.Tensor]:
    """Return the weights that `source` has for a model of `auto_class`, by the model's own parameter names, in fp32.

    Only safetensors files are read. What the source does not have (a new head) is left out.
    """
    folder = Path(source)
    if (folder / "pytorch_model.bin").exists() and not list(folder.glob("model*.safetensors*")):
        raise UserError(
            f"--model {source}: its weights are a pickle, which may run any code and is not read; write them as "
            f"safetensors once, with the save_pretrained() of transformers"
        )
    model, info = from_source(
        auto_class,
        source,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    absent = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}


def save_config(model: Any, folder: Path) -> None:
    """Write the configuration files of a transformers model, with the class that it is an instance of.

    config.json names that class as its `architectures`, whichever one the model's configuration came with.
    """
    from torch.distributed.fsdp import FSDPModule

    # FSDP2 gives a model a class of its own, derived from the model's.
    model_class = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    model.config.architectures = [model_class.__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def require_room(tokenizer: Any, flag: str, num_tokens: int) -> None:
    """Raise UserError when the limit that an option sets leaves no room for a text beside the tokens that frame it."""
    least = tokenizer.num_special_tokens_to_add() + 1
    if num_tokens < least:
        raise UserError(f"{flag} {num_tokens}: must be at least {least}, with the tokens that the tokenizer adds")


def longest_input(model: nn.Module) -> int:
    """Return how many tokens an encoder's table of positions has room for; 0: it has none, and takes any number."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its relatives count positions from the one after the padding's.
            return module.num_embeddings - (module.padding_idx + 1 if module.padding_idx is not None else 0)
    return 0


# Kinds of models whose attention keeps packed documents apart by positions that begin anew, each one tested. Others
# take positions too and let a document see those before it (OPT, BLOOM), or carry a state across (Jamba).
PACKING_MODELS = (
    *("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj"),
    *("granite", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2"),
    *("qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
)


def causal_config(source: str | Path, tokenizer: Any, *, context_length: int) -> Any:
    """Return the configuration of a causal language model.

    Raises UserError when it is of another kind, the tokenizer has more tokens, or it cannot read as many at once.
    """
    from transformers import AutoConfig

    config = from_source(AutoConfig, source)
    if config.model_type not in PACKING_MODELS:
        raise UserError(
            f"--model {source}: a {config.model_type} is no causal language model, or none that is known to keep "
            f"packed documents apart; take one of {', '.join(PACKING_MODELS)}"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--model {source}: it knows {config.vocab_size:,} tokens, the tokenizer has {len(tokenizer):,}. "
            f"Leave out --tokenizer, or give that of the model"
        )
    longest = getattr(config, "max_position_embeddings", context_length)
    if context_length > longest:
        raise UserError(f"--context-length {context_length}: this model reads at most {longest} tokens")
    return config


def tokenizer_key(tokenizer: Any) -> str:
    """Return a text that says all that a tokenizer's outcome depends on, for `derived`."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call left there.
        content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        return json.dumps([content, tokenizer.truncation_side])
    with TemporaryDirectory() as folder:
        paths = tokenizer.save_vocabulary(folder)
        digests = [xxhash.xxh3_128_hexdigest(Path(path).read_bytes()) for path in paths]
    return repr((type(tokenizer), tokenizer.init_kwargs, digests))
