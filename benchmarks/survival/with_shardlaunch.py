"""The task as a recipe of shardlaunch: resumes by itself, and stops at a signal, without an option."""

from dataclasses import dataclass
from pathlib import Path

import task
import torch
from safetensors.torch import load_file

from shardlaunch import Options, Recipe, TensorData, launch, option

TASK = task.Task()


@dataclass(kw_only=True)
class MlpOptions(Options):
    """Options of the task."""

    epochs: int = task.NUM_EPOCHS
    global_batch_size: int = task.GLOBAL_BATCH_SIZE
    micro_batch_size: int = TASK.batch_size
    eval_every: int = option(task.EVAL_EVERY, mark="free")
    save_every: int = option(task.SAVE_EVERY, mark="free")
    save_on_best: bool = option(False, mark="free")
    keep: int = option(0, mark="free")
    lr: float = task.LEARNING_RATE
    seed: int = task.SEED
    threads_per_rank: int = 1
    output_dir: str = option(str(TASK.run_dir), mark="free")


class Mlp(Recipe):
    """Classify points."""

    options: MlpOptions

    def datasets(self):
        return {split: TensorData(**TASK.points(split)) for split in ("train", "eval")}

    def model(self):
        return TASK.model()

    def forward(self, model, batch):
        return model(batch["inputs"], batch["ids"])

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

    def export(self, folder: Path, model):
        TASK.save()

    def usage(self, checkpoint: Path) -> str:
        last = TASK.run_dir / "checkpoints" / f"step-{task.NUM_STEPS:08}"
        if last.exists() and not (TASK.folder / "final").exists():
            files = [load_file(path) for path in last.glob("model-*.safetensors")]
            TASK.finish({name: tensor for file in files for name, tensor in file.items()})
        return ""


launch(Mlp)
