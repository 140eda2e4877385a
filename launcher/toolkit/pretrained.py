"""Hugging Face models, configurations and tokenizers from a hub id or a local folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xxhash
from torch import nn

from shardlaunch.checkpoints.mapped import in_files
from shardlaunch.checkpoints.names import ADAPTER_WEIGHTS
from shardlaunch.checkpoints.stored import StoredTensors
from shardlaunch.errors import UserError
from shardlaunch.launcher.toolkit.families import (
    CLASSIFIERS,
    PACKING_MODELS,
    ROW_MODELS,
    prepare_padding,
    require_no_effect_of_padding,
    require_vocabulary,
)

_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def from_source(auto_class: Any, source: str | Path, *, flag: str = "--model", **options: Any) -> Any:
    """Return `auto_class.from_pretrained(source)`. Raises UserError when that fails.

    `flag` is the option that sets the source.
    """
    path = Path(source)
    needed = "tokenizer.json" if flag == "--tokenizer" else "config.json"
    if path.is_file() or (path.is_dir() and not (path / needed).exists()):
        raise UserError(f"{flag} {source}: not a {flag.strip('-')} folder: it has no {needed}")
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
            f"{flag} {source}: not found locally or on the Hugging Face Hub ({reason}). "
            f"Give a local folder or a hub id, or use --preset demo, which works offline."
        ) from error


def from_config(auto_class: Any, config: Any, source: str | Path) -> Any:
    """Return `auto_class.from_config(config)` in fp32. Raises UserError when there is no such model."""
    try:
        return auto_class.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UserError(
            f"--model {source}: model type {config.model_type!r} has no "
            f"{auto_class.__name__.removeprefix('AutoModelFor')} head; choose another --model"
        ) from error


def pretrained_weights(auto_class: Any, source: str | Path, **options: Any) -> Mapping[str, torch.Tensor]:
    """Return the weights of `source` for a model of `auto_class`, by the model's own parameter names, in fp32.

    Only safetensors files are read. Weights that the source does not have (a new head) are left out. A tensor is read
    when it is asked for; under FSDP2 and ZeRO 3 each process reads its shards only.
    """
    folder = Path(source)
    if (folder / ADAPTER_WEIGHTS).exists() and not list(folder.glob("model*.safetensors*")):
        raise UserError(
            f"--model {source}: holds an adapter, without its base model; merge them (`shardlaunch ckpt export "
            f"{source} OUT --merge`), and give OUT"
        )
    if (folder / "pytorch_model.bin").exists() and not list(folder.glob("model*.safetensors*")):
        raise UserError(
            f"--model {source}: its weights are a pickle file, which could run arbitrary code, so it is not loaded; "
            f"convert it to safetensors with save_pretrained() of transformers"
        )

    def loaded(dtype: torch.dtype | str) -> StoredTensors:
        model, info = from_source(
            auto_class,
            source,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        absent = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
        return in_files({name: tensor for name, tensor in model.state_dict().items() if name not in absent})

    # In its own dtype the model is a view of its files. What transformers computes, it must compute in fp32.
    found = loaded("auto")
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in found.tensors.values()):
        found = loaded(torch.float32)
    return replace(found, dtype=torch.float32)


def num_labels_to_load(config: Any, names: Sequence[str]) -> int:
    """Return the number of labels to load the weights of a classifier with: `len(names)`, if its head is to be kept.

    Else another one, so that `pretrained_weights` leaves the head out: the head of a classifier of as many other
    classes would begin with what it says of those.
    """
    known = [str(config.id2label[number]) for number in sorted(config.id2label)]
    unnamed = [f"LABEL_{number}" for number in range(len(known))]
    return len(names) if known in (list(names), unnamed) else len(names) + 1


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


def without_dropout(config: Any) -> dict[str, float]:
    """Set the rates of dropout of a model's configuration to 0, and return what they were, by name."""
    rates = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, float) and value > 0 and ("dropout" in name or name.endswith("pdrop"))
    }
    config.update(dict.fromkeys(rates, 0.0))
    return rates


def word_tokenizer(source: str | Path) -> Any:
    """Return the tokenizer of a model, for texts that are lists of words. Raises UserError for one without offsets."""
    from transformers import AutoTokenizer

    tokenizer = from_source(AutoTokenizer, source)
    if not tokenizer.is_fast:
        raise UserError(f"--model {source}: its tokenizer has no fast version, which is needed here; choose another")
    if getattr(tokenizer, "add_prefix_space", None) is False:  # without it, a word would be one that begins a text
        tokenizer = from_source(AutoTokenizer, source, add_prefix_space=True)
    return tokenizer


def require_room(tokenizer: Any, flag: str, num_tokens: int) -> None:
    """Raise UserError when a length limit has no room for text besides the tokenizer's special tokens."""
    least = tokenizer.num_special_tokens_to_add() + 1
    if num_tokens < least:
        raise UserError(f"{flag} {num_tokens}: must be at least {least}, including the tokenizer's special tokens")


def prepare_encoder(tokenizer: Any, config: Any, *, source: str, max_length: int, micro_batch_size: int) -> None:
    """Check tokenizer and configuration of an encoder against each other, and prepare them for padding.

    `source` is its --model, `max_length` that of --max-length, `micro_batch_size` the most texts that are padded
    together. Raises UserError when padding may change a text's result, the vocabularies differ, or no text has room.
    """
    require_no_effect_of_padding(
        config, CLASSIFIERS, source=source, longest=max_length, micro_batch_size=micro_batch_size
    )
    require_vocabulary(tokenizer, config, source=source)
    prepare_padding(tokenizer, config, source=source)
    require_room(tokenizer, "--max-length", max_length)


def require_short_inputs(model: nn.Module, max_length: int) -> None:
    """Raise UserError when --max-length is more than a model's position embeddings take."""
    longest = longest_input(model)
    if longest and max_length > longest:
        raise UserError(f"--max-length {max_length}: this model takes at most {longest} tokens")


def longest_input(model: nn.Module) -> int:
    """Return the size of a model's position embeddings in tokens; 0: it has none, and no limit."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding):
            # RoBERTa-like models count positions from padding_idx + 1, BART-like ones from their offset.
            unused = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return int(module.num_embeddings - unused)
    return 0


def causal_config(source: str | Path, tokenizer: Any, *, context_length: int, packed: bool = True) -> Any:
    """Return the configuration of a causal language model, for documents that are `packed`, or one per row.

    Raises UserError for another model type, a tokenizer with more tokens than the model, or a too long context.
    """
    from transformers import AutoConfig

    config = from_source(AutoConfig, source)
    kind = config.model_type
    if packed and kind in ROW_MODELS:
        raise UserError(
            f"--model {source}: model type {kind!r} is not known to separate packed documents; use --no-packing (one "
            f"document per row)"
        )
    if kind not in PACKING_MODELS + ROW_MODELS:
        raise UserError(
            f"--model {source}: model type {kind!r} is not a causal language model that is known to work here; "
            f"supported: {', '.join(PACKING_MODELS)}; with --no-packing also {', '.join(ROW_MODELS)}"
        )
    require_vocabulary(tokenizer, config, source=str(source), hint="Remove --tokenizer, or use the model's own")
    longest = getattr(config, "max_position_embeddings", None) or context_length
    if context_length > longest:
        raise UserError(f"--context-length {context_length}: this model takes at most {longest} tokens")
    return config


def tokenizer_key(tokenizer: Any) -> str:
    """Return a string that identifies a tokenizer's behaviour, as part of a key for `derived`."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Truncation and padding are left over from the last call.
        content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        return json.dumps([content, tokenizer.truncation_side])
    with TemporaryDirectory() as folder:
        paths = tokenizer.save_vocabulary(folder)
        digests = [xxhash.xxh3_128_hexdigest(Path(path).read_bytes()) for path in paths]
    return repr((type(tokenizer), tokenizer.init_kwargs, digests))
