"""Distillation: a small net learns from labels and from a larger one, which is not trained."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, launch
from shardlaunch.data import stored_weights
from shardlaunch.metrics import named_metrics

NUM_FEATURES, NUM_CLASSES = 16, 4


@dataclass(kw_only=True)
class DistillationOptions(Options):
    """Options of the distillation."""

    global_batch_size: int = 64
    micro_batch_size: int = 16
    width: int = 16
    """Width of the net that is trained."""
    teacher: str = ""
    """A checkpoint of a run of this recipe with --teacher-width as its --width; empty: train without a teacher."""
    teacher_width: int = 256
    """Width of the teacher."""
    temperature: float = 2.0
    """What logits are divided by, for the teacher to say more than the most likely class."""


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


class DistillationRecipe(Recipe):
    """Classify points by the nearest of several centers."""

    options: DistillationOptions
    best_metric = "accuracy"

    def datasets(self):
        generator = torch.Generator().manual_seed(0)
        centers = torch.randn(5 * NUM_CLASSES, NUM_FEATURES, generator=generator)
        inputs = torch.randn(2400, NUM_FEATURES, generator=generator)
        labels = torch.cdist(inputs, centers).argmin(dim=1) % NUM_CLASSES
        cut = 2000
        return {
            "train": TensorData(inputs=inputs[:cut], labels=labels[:cut]),
            "eval": TensorData(inputs=inputs[cut:], labels=labels[cut:]),
        }

    def model(self):
        return net(self.options.width)

    def references(self):
        if not self.options.teacher:
            return {}
        teacher = net(self.options.teacher_width)
        stored = stored_weights(self.options.teacher, teacher.state_dict(), option="--teacher")
        teacher.load_state_dict(dict(stored))
        return {"teacher": teacher}

    def loss(self, outputs, batch):
        losses = {"labels": F.cross_entropy(outputs, batch["labels"], reduction="sum")}
        if self.reference:
            heat = self.options.temperature
            wanted = (self.reference["teacher"](batch["inputs"]) / heat).log_softmax(dim=-1)
            found = (outputs / heat).log_softmax(dim=-1)
            losses["teacher"] = heat**2 * F.kl_div(found, wanted, reduction="sum", log_target=True)
        return losses

    def metrics(self):
        return named_metrics("accuracy", num_classes=NUM_CLASSES)


if __name__ == "__main__":
    launch(DistillationRecipe)
