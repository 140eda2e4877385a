"""Load an exported model in a process of its own and call it: `python -m ... FORMAT FOLDER INPUTS OUTPUTS [RUN ...]`.

INPUTS and OUTPUTS are safetensors files of tensors named NUMBER/NAME, one number per batch.
"""

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shardlaunch.launcher.commands.export.formats import FORMATS
from shardlaunch.launcher.commands.export.plain import PlainModel

Called = Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]


def grouped(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return tensors named NUMBER/NAME as one mapping per number."""
    groups: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        groups.setdefault(int(number), {})[name] = tensor
    return [groups[number] for number in sorted(groups)]


def _loaded(name: str, folder: Path, constants: Mapping[str, Any], names: list[str], run: str) -> Called:
    """Return what calls an exported model."""
    if name in FORMATS:
        return FORMATS[name].load(folder / FORMATS[name].file)
    model = _of_transformers(folder) if name == "hf" else _of_recipe(folder, **json.loads(run))
    plain = PlainModel(model.eval(), names, constants)
    return lambda inputs: list(plain(*inputs.values()))


def _of_transformers(folder: Path) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model: nn.Module = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
    return model


def _of_recipe(folder: Path, *, path: str, recipe: str) -> nn.Module:
    """Return the recipe's model with the exported weights."""
    from shardlaunch.launcher.commands.ckpt.output import warn
    from shardlaunch.launcher.commands.trained import open_run
    from shardlaunch.launcher.runs.model import build_model

    run = open_run(Path(path), step=None, recipe_path=recipe, warn=warn)
    run.load_data()
    model, _ = build_model(run.recipe, run.recipe.options.seed, is_resumed=True)
    weights = load_file(folder / "model.safetensors")
    aliases = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in weights}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tensors = model.state_dict(keep_vars=True)
    assert not unexpected
    assert all(id(tensors[name]) in aliases for name in missing)
    return model


def main(name: str, folder: str, inputs: str, outputs: str, about: str) -> None:
    """Call the model on each batch, and write its outputs."""
    warnings.simplefilter("ignore")
    facts = json.loads(about)
    batches = grouped(load_file(inputs))
    call = _loaded(name, Path(folder), facts["constants"], facts["names"], facts["run"])
    found = {}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            ordered = {one: batch[one] for one in facts["names"]}
            for position, output in enumerate(call(ordered)):
                found[f"{number}/{position}"] = output.detach().cpu().contiguous()
    save_file(found, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
