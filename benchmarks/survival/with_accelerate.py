"""The task with accelerate: `save_state`, `load_state` and `skip_first_batches`, as in its checkpointing guide."""

import os
import re

import task
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader


def rows(split: str) -> list[dict[str, torch.Tensor]]:
    """Return the samples as the default collator takes them."""
    columns = TASK.points(split)
    return [{name: column[row] for name, column in columns.items()} for row in range(len(columns["ids"]))]


TASK = task.Task()
set_seed(task.SEED)
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
model = TASK.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=task.LEARNING_RATE)
optimizer.register_state_dict_pre_hook(lambda _: TASK.save())  # in a save: after the weights, before the optimizer
model, optimizer, train, evaluation = accelerator.prepare(
    model,
    optimizer,
    DataLoader(rows("train"), batch_size=TASK.batch_size, shuffle=True),
    DataLoader(rows("eval"), batch_size=TASK.batch_size),
)
step = 0
if accelerator.is_main_process:
    TASK.run_dir.mkdir(exist_ok=True)
accelerator.wait_for_everyone()
if folders := [entry.path for entry in os.scandir(TASK.run_dir) if entry.is_dir()]:
    newest = max(folders, key=os.path.getctime)
    accelerator.load_state(newest)
    step = int(re.sub(r".*step_", "", newest))
first_epoch, num_skipped = divmod(step, len(train))
for epoch in range(first_epoch, task.NUM_EPOCHS):
    train.set_epoch(epoch)
    is_resumed = epoch == first_epoch and num_skipped
    for batch in accelerator.skip_first_batches(train, num_skipped) if is_resumed else train:
        model.train()
        loss = torch.nn.functional.cross_entropy(model(batch["inputs"], batch["ids"]), batch["labels"])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % task.EVAL_EVERY == 0:
            model.eval()
            with torch.no_grad():
                for held_out in evaluation:
                    accelerator.gather_for_metrics((model(held_out["inputs"], held_out["ids"]), held_out["labels"]))
        if step % task.SAVE_EVERY == 0 or step == task.NUM_STEPS:
            accelerator.save_state(str(TASK.run_dir / f"step_{step}"))
TASK.finish(accelerator.unwrap_model(model).state_dict())
accelerator.end_training()
