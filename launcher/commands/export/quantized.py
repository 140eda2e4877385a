"""Weights of linear layers in 8 bits, by torchao: `shardlaunch export --quantize int8`."""

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardlaunch.checkpoints.exporting import CONFIG
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.evaluate import metrics_of
from shardlaunch.launcher.commands.export.formats import reason_of
from shardlaunch.launcher.commands.export.plain import PlainModel
from shardlaunch.launcher.commands.trained import TrainedRun
from shardlaunch.launcher.runs.data import RunData

INT8 = "int8"
"""One byte per weight, with a scale in fp32 per row; layers compute in fp32."""


def check_quantization(name: str, kind: str, kinds: Collection[str]) -> None:
    """Raise UserError for an unknown kind of weights, and for formats that do not hold it."""
    if name == "int4":
        raise UserError(
            "--quantize int4: torchao has weights of 4 bits on GPUs only, and exports are made and compared on the "
            "CPU; use --quantize int8"
        )
    if name != INT8:
        raise UserError(f"--quantize {name}: must be {INT8}")
    if kind not in kinds:
        raise UserError(f"--quantize {name}: --format {kind} does not hold such weights; use {' or '.join(kinds)}")
    if find_spec("torchao") is None:
        raise UserError(f'--quantize {name}: torchao is not installed: pip install "shardlaunch[quantize]"')


@torch.no_grad()
def quantize_called_layers(model: nn.Module, call: Any) -> None:
    """Store the weights of the linear layers that `call()` calls in 8 bits, but for those that other layers share.

    Raises UserError where there are none.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda module, args, output: called.add(layers[module]))
        for module in layers
        if uses[id(module.weight)] == 1
    ]
    call()
    for hook in hooks:
        hook.remove()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in called)
    _check_any(model)


def write_quantized_folder(plain: Path, folder: Path) -> nn.Module:
    """Write a folder of a transformers model again, with weights in 8 bits; return the model. Raises UserError."""
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    architecture = json.loads((plain / CONFIG).read_text())["architectures"][0]
    try:
        model: Any = getattr(transformers, architecture).from_pretrained(
            plain,
            dtype=torch.float32,
            device_map="cpu",
            quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()),
        )
        _check_any(model)
        model.save_pretrained(folder)
    except (OSError, UserError):
        raise
    except Exception as error:  # of transformers and torchao, which have many kinds
        raise UserError(f"--quantize {INT8}: transformers cannot quantize this model: {reason_of(error)}") from error
    for path in plain.rglob("*"):  # the tokenizer's files and others
        target = folder / path.relative_to(plain)
        if path.is_file() and not target.exists() and path.suffix != ".safetensors":
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(path, target)
    return model.eval()  # type: ignore[no-any-return]


def comparable_metrics(run: TrainedRun, data: RunData, model: nn.Module) -> dict[str, float]:
    """Return the metrics that are one number each, on the run's evaluation data; none where there are no such data."""
    if "eval" not in data.splits:
        return {}
    found = metrics_of(run, data, model, precision_name="fp32")
    return {name: value for name, value in found.items() if not isinstance(value, list)}


def changes(
    quantize: str,
    plain: PlainModel,
    exact: Sequence[tuple[torch.Tensor, ...]],
    expected: Sequence[tuple[torch.Tensor, ...]],
    metrics: Mapping[str, float],
    metrics_now: Mapping[str, float],
) -> list[str]:
    """Return what quantized weights change, in lines."""
    before, after = (
        [one.double().flatten() for outputs in batches for one in outputs] for batches in (exact, expected)
    )
    most = float((torch.cat(after) - torch.cat(before)).abs().nan_to_num(posinf=0.0).max())
    largest = float(torch.cat(before).abs().nan_to_num(posinf=0.0).max())
    outputs = f"outputs differ by up to {most:.2g} from those in fp32, which are up to {largest:.2g}"
    lines = [f"{num_quantized(plain.model)} linear layers with {quantize} weights: {outputs}"]
    lines += [
        f"eval/{name}: {value:.6g} in fp32, {metrics_now[name]:.6g} in {quantize}" for name, value in metrics.items()
    ]
    return lines if metrics else [*lines, "the run has no evaluation data, so that no metrics are compared"]


def num_quantized(model: nn.Module) -> int:
    """Return the number of tensors in 8 bits."""
    return sum(type(tensor).__module__.startswith("torchao.") for tensor in model.parameters())


def _check_any(model: nn.Module) -> None:
    if not num_quantized(model):
        raise UserError(
            f"--quantize {INT8}: the model calls no torch.nn.Linear with weights of its own, so nothing of it would "
            f"be quantized (layers of GPT-2 are of a class of their own, Conv1D)"
        )


@contextmanager
def quantization_errors() -> Iterator[None]:
    """Raise what goes wrong in a model with quantized weights as UserError."""
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"--quantize {INT8}: the model does not run with such weights: {reason_of(error)}") from error
