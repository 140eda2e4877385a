"""The formats of `shardlaunch export` that hold a whole model: how each is written, and how it is loaded again."""

import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.export.plain import PlainModel

Outputs = list[torch.Tensor]
_LARGEST_ONNX = 1_500_000_000  # bytes of one file; above, the weights have files of their own
_MOST_QUOTED = 400


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a model is exported with: inputs by name, and which of their axes may have other sizes."""

    inputs: Mapping[str, torch.Tensor]
    dynamic: Mapping[str, Sequence[int]]
    output_names: Sequence[str]

    def shapes(self) -> tuple[dict[int, Any], ...]:
        """Return the axes as torch.export takes them."""
        return tuple(dict.fromkeys(self.dynamic[name], torch.export.Dim.AUTO) for name in self.inputs)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format: its file, what writes it, what calls it when it is loaded again, and the packages for that."""

    file: str
    write: Callable[[PlainModel, Example, Path], None]
    load: Callable[[Path], Callable[[Mapping[str, torch.Tensor]], Outputs]]
    packages: tuple[str, ...] = ()

    def check_available(self, name: str) -> None:
        """Raise UserError where a package is missing."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise UserError(
                f'--format {name}: {", ".join(missing)} is not installed: pip install "shardlaunch[{name}]"'
            )


def _write_program(model: PlainModel, example: Example, path: Path) -> None:
    program = torch.export.export(model, tuple(example.inputs.values()), dynamic_shapes=(example.shapes(),))
    torch.export.save(program, path)


def _load_program(path: Path) -> Callable[[Mapping[str, torch.Tensor]], Outputs]:
    module = torch.export.load(path).module()
    return lambda inputs: list(module(*inputs.values()))


def _write_script(model: PlainModel, example: Example, path: Path) -> None:
    with warnings.catch_warnings():
        # A trace has the branches that the example took, which a warning is all that says.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, tuple(example.inputs.values()), strict=False, check_trace=False)
    torch.jit.save(traced, path)


def _load_script(path: Path) -> Callable[[Mapping[str, torch.Tensor]], Outputs]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(path)
    return lambda inputs: list(module(*inputs.values()))


def _write_onnx(model: PlainModel, example: Example, path: Path) -> None:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    torch.onnx.export(
        model,
        tuple(example.inputs.values()),
        str(path),
        dynamo=True,
        dynamic_shapes=(example.shapes(),),
        input_names=list(example.inputs),
        output_names=list(example.output_names),
        external_data=num_bytes > _LARGEST_ONNX,
        verbose=False,
    )


def _load_onnx(path: Path) -> Callable[[Mapping[str, torch.Tensor]], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}  # those that the result does not depend on are gone
    return lambda inputs: [
        torch.from_numpy(output)
        for output in session.run(None, {name: one.numpy() for name, one in inputs.items() if name in taken})
    ]


FORMATS: Mapping[str, Format] = {
    "torch-export": Format(file="model.pt2", write=_write_program, load=_load_program),
    "onnx": Format(
        file="model.onnx", write=_write_onnx, load=_load_onnx, packages=("onnx", "onnxscript", "onnxruntime")
    ),
    "torchscript": Format(file="model.pt", write=_write_script, load=_load_script),
}


def write_format(name: str, model: PlainModel, example: Example, folder: Path) -> None:
    """Write a model in a format. Raises UserError with the reason where the model cannot be."""
    noise = io.StringIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with redirect_stdout(noise), redirect_stderr(noise), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            FORMATS[name].write(model, example, folder / FORMATS[name].file)
    except OSError:
        raise
    except Exception as error:  # each exporter has its own, and those of the model's own code
        raise UserError(
            f"--format {name}: this model cannot be exported: {reason_of(error)}. Branches and shapes that depend on "
            f"values of tensors are what most often cannot; --format safetensors takes any model"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return the first error that led to another, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_MOST_QUOTED].rstrip(".! ")
