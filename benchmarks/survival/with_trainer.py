"""The task with transformers' Trainer: `enable_jit_checkpoint`, and `resume_from_checkpoint` once there is one."""

import task
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class WithLoss(nn.Module):
    """The model as the Trainer calls it: with its loss."""

    def __init__(self, net: task.Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs, ids, labels):
        logits = self.net(inputs, ids)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Saving(Trainer):
    """The Trainer, which says when it saves: after the weights, before the optimizer."""

    def _save_optimizer_and_scheduler(self, output_dir):
        TASK.save()
        super()._save_optimizer_and_scheduler(output_dir)


def rows(split: str) -> list[dict[str, torch.Tensor]]:
    """Return the samples as the default collator takes them."""
    columns = TASK.points(split)
    return [{name: column[row] for name, column in columns.items()} for row in range(len(columns["ids"]))]


TASK = task.Task()
arguments = TrainingArguments(
    output_dir=str(TASK.run_dir),
    num_train_epochs=task.NUM_EPOCHS,
    per_device_train_batch_size=TASK.batch_size,
    per_device_eval_batch_size=TASK.batch_size,
    learning_rate=task.LEARNING_RATE,
    seed=task.SEED,
    save_strategy="steps",
    save_steps=task.SAVE_EVERY,
    eval_strategy="steps",
    eval_steps=task.EVAL_EVERY,
    enable_jit_checkpoint=True,
    remove_unused_columns=False,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Saving(
    model=WithLoss(TASK.model()),
    args=arguments,
    train_dataset=rows("train"),
    eval_dataset=rows("eval"),
)
has_checkpoint = TASK.run_dir.is_dir() and get_last_checkpoint(str(TASK.run_dir)) is not None
trainer.train(resume_from_checkpoint=has_checkpoint or None)
if trainer.state.global_step == trainer.state.max_steps:
    TASK.finish(trainer.accelerator.unwrap_model(trainer.model).state_dict())
