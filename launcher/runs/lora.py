"""LoRA adapters of a run: which layers get one, their values at the start, and what a checkpoint says of them.

The adapters are peft's, put into the recipe's model in place: it stays the model that it was, with the names that it
had but for those of adapted layers. A checkpoint has the names that peft saves, and no base model.
"""

import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from torch import nn

from shardlaunch.checkpoints.names import ADAPTER_CONFIG, ADAPTER_PREFIX, BASE
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import BaseRecord, read_record, to_json
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.runs.drawn_weights import value_digest
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.linear_layers import linear_layers, quantizable_layers
from shardlaunch.launcher.runs.quantized_base import Quantized, num_bytes, quantize
from shardlaunch.launcher.runs.start_values import StartValues
from shardlaunch.launcher.seeding import derive_seed, seeded
from shardlaunch.sharding.buffers import persistent_buffers

_ADAPTER = "default"
_MAGNITUDES = f"lora_magnitude_vector.{_ADAPTER}.weight"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
# peft trains them as a whole in a model of one of these tasks, also where they are pretrained.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters of a model, and the base model that they belong to."""

    config: Mapping[str, Any]
    """peft's configuration, as it is saved."""
    saved_names: Mapping[str, str]
    """Names in a checkpoint of what is trained, by the model's names."""
    num_layers: int
    narrow_layers: tuple[str, ...]
    """Adapted layers of which one dimension is below the rank."""
    num_trained: int
    """Elements."""
    whole_modules: tuple[str, ...]
    """Modules that are trained as a whole, because they are newly initialized."""
    base: BaseRecord
    """Its digest is known on the first rank of each machine."""
    base_buffers: Mapping[str, int]
    """Digests of the base's buffers, which are not saved either; on the first rank of each machine."""
    quantized: Quantized | None
    """None: the base is in floating point."""

    def describe(self) -> str:
        """Return what is trained, for the start-up summary."""
        variants = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if self.config[key]]
        kind = " and ".join(variants) or "LoRA"
        total = self.base.num_parameters + self.num_trained
        whole = f", and all of {', '.join(self.whole_modules)}" if self.whole_modules else ""
        return (
            f"{self.num_trained:,} of {total:,} parameters train ({self.num_trained / total:.2%}): {kind} of rank "
            f"{self.config['r']}, alpha {self.config['lora_alpha']:g}, on {self.num_layers} layers{whole}"
            f"{f'; {self.quantized.describe()}' if self.quantized else ''}"
        )

    def saved_aliases(self, aliases: Mapping[str, str]) -> dict[str, str]:
        """Return the other names of tied parameters, those of what is saved, by their names in a checkpoint."""
        saved = self.saved_names
        return {_saved_name(alias): saved[name] for alias, name in aliases.items() if name in saved}

    def export(self, folder: Path, model: nn.Module) -> None:
        """Write what peft needs to load the adapter, and which base model it is for. Rank 0.

        Raises UserError if the training has changed a buffer of the base model, which no checkpoint would have.
        """
        held = persistent_buffers(model)
        changed = [name for name, digest in self.base_buffers.items() if value_digest(held[name].cpu()) != digest]
        if changed:
            raise UserError(
                f"--lora-rank: the base model's {some(changed, 3)} changes in training, which a checkpoint of adapters "
                f"does not hold; use --freeze instead"
            )
        (folder / ADAPTER_CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        (folder / BASE).write_bytes(to_json(msgspec.to_builtins(self.base), indent=1))

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raise UserError if a checkpoint's adapters were trained on another base model. First rank of a machine."""
        saved = base_of(checkpoint)
        if saved.xxh3_64 != self.base.xxh3_64:
            raise UserError(
                f"{checkpoint.step_dir}: its adapters were trained beside other weights than those that {_here(self)} "
                f"has now (digest {saved.xxh3_64} -> {self.base.xxh3_64}; the base was {saved.model or 'not named'}); "
                f"bring these back, with --init-from if the run began with it, or start a new run"
            )


def _here(adapters: Adapters) -> str:
    return adapters.base.model or "the recipe"


def base_of(checkpoint: Checkpoint) -> BaseRecord:
    """Return which base model a checkpoint's adapters are for. Raises UserError for a checkpoint without."""
    if BASE not in checkpoint.manifest.files:
        raise UserError(f"{checkpoint.step_dir}: has no {BASE}, so it is not one of a run with --lora-rank")
    return read_record(checkpoint.step_dir / BASE, BaseRecord)


def digest_of(names: Iterable[str], value: Callable[[str], torch.Tensor]) -> str:
    """Return a digest of some values by name, each asked for once."""
    digest = xxhash.xxh3_64()
    for name in sorted(names):
        digest.update(f"{name} {value_digest(value(name)):016x}".encode())
    return digest.hexdigest()


def base_names(model: nn.Module, whole_modules: Iterable[str]) -> list[str]:
    """Return the weights and persistent buffers of a model without adapters that are not trained."""
    prefixes = tuple(f"{module}." for module in whole_modules)
    named = (*dict(model.named_parameters()), *persistent_buffers(model))
    return [name for name in named if not name.startswith(prefixes)] if prefixes else list(named)


def add_adapters(
    model: nn.Module,
    options: Options,
    *,
    new: Collection[str],
    values: StartValues | None = None,
    is_empty: bool = False,
    init: InitFrom | None = None,
) -> tuple[Adapters, StartValues | None]:
    """Put adapters into a model, and freeze all but them and what is `new`. Return them, and `values` with theirs.

    `new` names the parameters without pretrained values. A model that `is_empty` has no values; `values` has them on
    the first rank of each machine. Raises UserError for a model that cannot have adapters.
    """
    _check_model(model)
    parameters = dict(model.named_parameters())
    if len(new) == len(parameters):
        raise UserError(
            "--lora-rank: this model has no pretrained weights, and adapters beside random ones learn little; give a "
            "pretrained model, in most recipes with --model, or --init-from; or remove --lora-rank"
        )
    tensors = parameters | persistent_buffers(model)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    whole_modules = _whole_modules(model, new)
    targets = _targets(model, options, whole_modules)
    frozen = base_names(model, whole_modules)
    stays = set(frozen)
    whole = {name: tensor for name, tensor in tensors.items() if name not in stays}
    trained = [tensor for tensor in whole.values() if tensor.requires_grad]
    transposed = {name for name in targets if not isinstance(model.get_submodule(name), nn.Linear)}

    def value(name: str) -> torch.Tensor:
        return (values.read(name) if values is not None else tensors[name].detach()).to(dtypes[name])

    def magnitudes(name: str) -> torch.Tensor:
        layer: Any = model.get_submodule(name)
        weight = value(f"{name}.weight") if values is not None else layer.weight.detach()
        lengths: torch.Tensor = torch.linalg.norm(weight.T if name in transposed else weight, dim=1)
        return lengths

    has_values = values is not None or not is_empty
    base = BaseRecord(
        model=_source(model, frozen, init),
        xxh3_64=digest_of(frozen, value) if has_values else "",
        num_parameters=sum(parameters[name].numel() for name in frozen if name in parameters),
    )
    buffers = [name for name in frozen if name not in parameters]
    base_buffers = {name: value_digest(value(name)) for name in buffers} if has_values else {}
    quantized = _quantize(model, whole_modules) if options.lora_base_bits else None
    parameters = dict(model.named_parameters())
    lengths = {name: magnitudes(name) for name in targets} if options.dora and has_values else {}
    config = _config(
        model, options, targets, whole_modules, base_model=base.model, is_transposed=transposed == set(targets)
    )
    _inject(model, config, options.seed)
    for parameter in trained:
        parameter.requires_grad_(True)
    former = {id(parameter): name for name, parameter in parameters.items()}
    adapters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in former}
    if has_values:
        start = {name: _start_value(name, adapters[name], options.seed, lengths) for name in adapters}
        if values is not None:
            new_names = {former[id(p)]: name for name, p in model.named_parameters() if id(p) in former}
            values = values.with_adapters(new_names, start)
        else:
            for name, tensor in start.items():
                module, _, leaf = name.rpartition(".")
                model.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor))
    return Adapters(
        config=config,
        saved_names={name: _saved_name(name) for name in (*whole, *adapters)},
        num_layers=sum(".lora_A." in name for name in adapters),  # of fused experts, peft adapts parameters too
        narrow_layers=tuple(name for name in targets if min(tensors[f"{name}.weight"].shape) < options.lora_rank),
        num_trained=sum(tensor.numel() for tensor in (*trained, *adapters.values())),
        whole_modules=whole_modules,
        base=base,
        base_buffers=base_buffers,
        quantized=quantized,
    ), values


def _quantize(model: nn.Module, whole_modules: Sequence[str]) -> Quantized:
    """Quantize the base's linear layers in place. Raises UserError for a model without."""
    layers = quantizable_layers(model, whole_modules)
    if not layers:
        raise UserError(
            f"--lora-base-bits: {type(model).__name__} has no linear layers of torch's own to quantize, apart from its "
            f"output layer; remove it"
        )

    def bytes_now() -> int:
        names = set(base_names(model, whole_modules))
        return num_bytes(parameter for name, parameter in model.named_parameters() if name in names)

    before = bytes_now()
    quantize(model, layers)
    return Quantized(num_layers=len(layers), bytes_before=before, num_bytes=bytes_now())


def _check_model(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"--lora-rank: is for transformers models, but this recipe's model is a {type(model).__name__}; remove it, "
            f"or put adapters of peft into the model in model()"
        )
    if getattr(model, "peft_config", None):
        raise UserError("--lora-rank: the recipe's model() has put adapters of peft into its model; remove the option")
    if getattr(model, "is_quantized", False):
        raise UserError("--lora-rank: is for models in floating point; this one is quantized")


def _whole_modules(model: nn.Module, new: Collection[str]) -> tuple[str, ...]:
    """Return the modules to train as a whole: those of new parameters, and the head of a classifier, as peft does.

    A module of new parameters is as large as all parameters in it are new.
    """
    pretrained = [name for name, _ in model.named_parameters() if name not in new]
    modules = [name for name, _ in model.named_modules()]
    heads = _HEADS.get(_task(model) or "", ())
    found = [name for name in modules if heads and name.endswith(heads)]
    for name in new:
        module = name.rpartition(".")[0]
        if not module:
            raise UserError(f"--lora-rank: {name} is newly initialized, but is in no module that could be trained")
        while parent := module.rpartition(".")[0]:
            is_container = isinstance(model.get_submodule(parent), _CONTAINERS)
            if is_container or any(one.startswith(f"{parent}.") for one in pretrained):
                break
            module = parent
        found.append(module)
    # By the ends of names, peft finds what is trained as a whole.
    found += [name for name in modules if found and name.endswith(tuple(found))]
    return tuple(module for module in dict.fromkeys(found) if not any(module.startswith(f"{it}.") for it in found))


def _targets(model: Any, options: Options, whole_modules: Iterable[str]) -> list[str]:
    """Return the names of the layers that get an adapter. Raises UserError for a target that matches none."""
    linear = linear_layers(model, whole_modules)
    if not options.lora_targets:
        output_layer = model.get_output_embeddings()
        targets = [name for name in linear if model.get_submodule(name) is not output_layer]
        if not targets:
            raise UserError("--lora-rank: this model has no linear layers that an adapter could be put beside")
        return targets
    for target in options.lora_targets:
        if not any(_is_at_end(target, name) for name in linear):
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise UserError(
                f"--lora-targets {target}: no linear layer with pretrained weights of its own has this name; "
                f"available: {some(list(kinds), 12)}"
            )
    return [name for name in linear if any(_is_at_end(target, name) for target in options.lora_targets)]


def _task(model: nn.Module) -> str | None:
    """Return peft's name of what a model is for, None for another task."""
    return next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)


def _is_at_end(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _source(model: Any, frozen: Collection[str], init: InitFrom | None) -> str:
    """Return where the base model is: a folder or hub id, empty if that is not known."""
    if init is not None and init.match is not None:
        absent = [name for name in frozen if name not in init.match.stored_names]
        if absent:
            raise UserError(
                f"--init-from {init.weights.source}: with --lora-rank it must have all of the base model, but has not "
                f"{some(absent, 3)}"
            )
        return str(init.weights.files[0].parent.resolve())
    source = str(getattr(model.config, "_name_or_path", "") or "")
    path = Path(source).expanduser()
    return str(path.resolve()) if source and path.is_dir() else source


def _config(
    model: nn.Module,
    options: Options,
    targets: Sequence[str],
    whole_modules: Sequence[str],
    *,
    base_model: str,
    is_transposed: bool,
) -> dict[str, Any]:
    """Return peft's configuration, with layers by the ends of their names where no others end so."""
    from peft import LoraConfig

    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    meant = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=ends if meant == targets else list(targets),
        modules_to_save=list(whole_modules) or None,
        fan_in_fan_out=is_transposed,
        base_model_name_or_path=base_model,
        task_type=_task(model),
        inference_mode=True,
    )
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _inject(model: nn.Module, config: Mapping[str, Any], seed: int) -> None:
    """Put adapters without values into a model. Raises UserError for what peft refuses."""
    import peft

    peft_config = peft.LoraConfig(**{**config, "modules_to_save": None, "inference_mode": False})
    with warnings.catch_warnings(), seeded(derive_seed(seed, "model")):
        warnings.simplefilter("ignore")
        try:
            peft.inject_adapter_in_model(peft_config, model, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
        except ValueError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"--lora-rank: peft refuses it: {reason}; --lora-targets chooses other layers") from error


def _start_value(name: str, parameter: torch.Tensor, seed: int, magnitudes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the value that an adapter's parameter starts with: as peft does, but drawn by (seed, name)."""
    if name.endswith(_MAGNITUDES):
        return magnitudes[name.removesuffix(f".{_MAGNITUDES}")]
    value = torch.zeros(parameter.shape, dtype=parameter.dtype)
    if ".lora_A." in name:
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def _saved_name(name: str) -> str:
    """Return the name under which peft saves a tensor: without that of the adapter."""
    if name.endswith(_MAGNITUDES):
        name = name.removesuffix(f".{_ADAPTER}.weight")
    return ADAPTER_PREFIX + name.replace(f".{_ADAPTER}.weight", ".weight")
