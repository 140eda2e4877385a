"""Models of checkpoints that hold an adapter: the base model is loaded from where it is, and compared."""

from importlib.util import find_spec
from typing import Any
from warnings import catch_warnings, simplefilter

import torch

from shardlaunch.checkpoints.exporting import Weight
from shardlaunch.checkpoints.names import ADAPTER_CONFIG, BASE
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import decode, read_bytes
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.text_models import listed_files, whole_model
from shardlaunch.launcher.runs.linear_layers import quantizable_layers
from shardlaunch.launcher.runs.lora import base_names, base_of, digest_of
from shardlaunch.launcher.runs.quantized_base import quantize
from shardlaunch.sharding.buffers import persistent_buffers


def holds_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is one of a run with --lora-rank."""
    return BASE in checkpoint.manifest.files


def model_of(checkpoint: Checkpoint, auto_class: Any, *, kind: str, ema: bool = False) -> Any:
    """Load the model of a checkpoint, with its adapter if it holds one; with `ema` with the average of its weights.

    Raises UserError for another kind of model.
    """
    if not holds_adapter(checkpoint):
        return whole_model(checkpoint, auto_class, kind=kind, ema=ema)
    return with_adapter(checkpoint, auto_class=auto_class, kind=kind, ema=ema).get_base_model()


def base_bits(checkpoint: Checkpoint) -> int:
    """Return the bits of the weights that a checkpoint's adapters were trained beside; 0: floating point."""
    return int(checkpoint.recipe.options.get("lora_base_bits", 0))


def merging_note(checkpoint: Checkpoint) -> str:
    """Return what is to be said where a checkpoint's adapter is merged: nothing, unless its base was quantized."""
    bits = base_bits(checkpoint)
    if not bits:
        return ""
    return (
        f"The training kept the base model in {bits} bits; the adapter is merged into the base model in floating "
        f"point, so outputs differ from those in training by the rounding to {bits} bits."
    )


def with_adapter(
    checkpoint: Checkpoint,
    *,
    auto_class: Any = None,
    kind: str = "transformers model",
    ema: bool = False,
    to_merge: bool = False,
) -> Any:
    """Return the model of peft of a checkpoint that holds an adapter, or its average, in fp32 and evaluation mode.

    Its base is quantized as in training, unless it is `to_merge`. The class is the one that config.json names, which
    must be that of `auto_class` if that is given. Raises UserError for another kind of model, and for a base model that
    is gone or has changed.
    """
    where, base = checkpoint.step_dir, base_of(checkpoint)
    if find_spec("peft") is None:
        raise UserError(f'{where}: holds an adapter, which needs peft: pip install "shardlaunch[lora]"')
    if not base.model:
        raise UserError(f"{where}: does not say where its base model is; load both with peft")
    import transformers
    from peft import PeftModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    with listed_files(checkpoint, ema=ema) as folder:
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            name = (config.architectures or [""])[0]
            model_class = auto_class or getattr(transformers, name, None)
        except Exception as error:  # transformers raises anything for a configuration that it does not understand
            raise UserError(f"{where}: not a checkpoint of a {kind} ({_reason(error)})") from error
        if model_class is None:
            raise UserError(f"{where}: transformers has no model class {name!r}, which its config.json names")
        try:
            model = model_class.from_pretrained(base.model, config=config, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{where}: holds an adapter; its base model {base.model} cannot be loaded ({_reason(error)}); bring it "
                f"back"
            ) from error
        if type(model).__name__ != name:
            raise UserError(f"{where}: not a checkpoint of a {kind}, but of a {name}")
        adapter = decode(where / ADAPTER_CONFIG, read_bytes(where / ADAPTER_CONFIG), dict[str, Any])
        tensors = dict(model.named_parameters()) | persistent_buffers(model)
        whole_modules = adapter.get("modules_to_save") or ()
        names = base_names(model, whole_modules)
        found = digest_of(names, lambda name: tensors[name].detach())
        if found != base.xxh3_64:
            raise UserError(
                f"{where}: holds an adapter, but its base model {base.model} has other weights now than in training "
                f"(digest {base.xxh3_64} -> {found}); bring them back"
            )
        if base_bits(checkpoint) and not to_merge:
            quantize(model, quantizable_layers(model, whole_modules))
        with catch_warnings():
            simplefilter("ignore")
            return PeftModel.from_pretrained(model, folder).eval()


def merged_weights(checkpoint: Checkpoint, *, ema: bool = False) -> list[Weight]:
    """Return the weights of a checkpoint's base model with its adapter merged in, under the base model's own names.

    The base model is loaded as a whole. Raises UserError as `with_adapter` does.
    """
    model = with_adapter(checkpoint, ema=ema, to_merge=True).merge_and_unload()
    tensors = dict(model.named_parameters()) | persistent_buffers(model)
    return [_weight(name, tensor.detach()) for name, tensor in tensors.items()]


def _weight(name: str, tensor: torch.Tensor) -> Weight:
    flat = tensor.reshape(-1)
    return Weight(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda start, end: flat[start:end])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
