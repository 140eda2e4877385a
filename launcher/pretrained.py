"""Models, configurations, tokenizers and weights from a hub id or a local path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardlaunch.checkpoints.layout import MANIFEST
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.errors import UserError
from shardlaunch.launcher.display import Display
from shardlaunch.launcher.run_folder import CHECKPOINTS, open_path


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
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if path.is_dir():
            raise UserError(f"{flag} {source}: not a {flag.strip('-')} folder: {reason}") from error
        raise UserError(
            f"{flag} {source}: neither a local folder nor to be had from the hub ({reason}). "
            f"Give a local folder, or use --preset demo, which needs no hub."
        ) from error


def pretrained_weights(auto_class: Any, source: str | Path, **options: Any) -> Mapping[str, torch.Tensor]:
    """Return the weights that `source` has for a model of `auto_class`, by the model's own parameter names, in fp32.

    Only safetensors files are read. What the source does not have (a new head) is left out.
    """
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


def longest_input(model: nn.Module) -> int:
    """Return how many tokens an encoder's table of positions has room for; 0: it has none, and takes any number."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its relatives count positions from the one after the padding's.
            return module.num_embeddings - (module.padding_idx + 1 if module.padding_idx is not None else 0)
    return 0


def stored_weights(source: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that safetensors files hold under the names of `expected`; other names in them are left.

    `source`, the value of --weights: such a file, a folder with files model*.safetensors, a checkpoint of a run, a
    run's folder (of which the newest valid checkpoint), or a hub id with a file model.safetensors. Raises UserError
    when they are not to be had, and for a tensor that is absent or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in _weight_files(source):
        try:
            with safe_open(file, framework="pt") as stored:
                tensors.update({name: stored.get_tensor(name) for name in expected.keys() & set(stored.keys())})
        except (OSError, SafetensorError) as error:
            raise UserError(f"--weights {file}: not a safetensors file that can be read ({error})") from error
    for name, tensor in expected.items():
        wanted, found = list(tensor.shape), list(tensors[name].shape) if name in tensors else "absent"
        if wanted != found:
            raise UserError(
                f"--weights {source}: not of this model: {name} is {found} and must be {wanted}; "
                f"take other weights, or give the model's options the values that they were made with"
            )
    return tensors


def _weight_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        if (path / MANIFEST).exists() or (path / CHECKPOINTS).is_dir():
            try:
                path = open_path(path, peers=Peers(), display=Display(silent=True)).step_dir
            except UserError as error:
                raise UserError(f"--weights {error}") from error
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise UserError(f"--weights {source}: there is no model*.safetensors in this folder")
        return files
    return [_from_hub(source)]


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except Exception as error:  # the hub's client raises errors of many families
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--weights {source}: neither a local path nor to be had from the hub ({reason}). "
            f"Give a safetensors file or a run's folder, or use --preset demo, which needs no hub."
        ) from error


def causal_config(source: str | Path, tokenizer: Any, *, context_length: int) -> Any:
    """Return the configuration of a causal language model.

    Raises UserError when it is of another kind, the tokenizer has more tokens, or it cannot read as many at once.
    """
    import inspect

    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    config = from_source(AutoConfig, source)
    is_masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if is_masked or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--model {source}: a {config.model_type} is no causal language model, such as gpt2")
    if "position_ids" not in inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].forward).parameters:
        raise UserError(f"--model {source}: a {config.model_type} takes no positions, which keep documents apart")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--model {source}: it knows {config.vocab_size:,} tokens, the tokenizer has {len(tokenizer):,}. "
            f"Leave out --tokenizer, or give that of the model"
        )
    longest = getattr(config, "max_position_embeddings", context_length)
    if context_length > longest:
        raise UserError(f"--context-length {context_length}: this model reads at most {longest} tokens")
    return config
