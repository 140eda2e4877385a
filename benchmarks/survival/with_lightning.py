"""The task with Lightning: `ModelCheckpoint(save_on_exception=True, save_last=True)`, and `ckpt_path="last"`."""

import lightning
import task
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler


class Module(lightning.LightningModule):
    """The model with its loss and optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TASK.model()

    def training_step(self, batch, batch_index):
        return torch.nn.functional.cross_entropy(self.net(batch["inputs"], batch["ids"]), batch["labels"])

    def validation_step(self, batch, batch_index):
        self.net(batch["inputs"], batch["ids"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=task.LEARNING_RATE)


class Saving(Callback):
    """Says when a checkpoint is saved."""

    def on_save_checkpoint(self, trainer, module, checkpoint):
        TASK.save()


def loader(split: str) -> StatefulDataLoader:
    """Return a loader whose position is part of Lightning's checkpoints, with its sampler's.

    The sampler that Lightning puts in by itself does not come back in the same order behind torchdata's loader.
    """
    columns = TASK.points(split)
    rows = [{name: column[row] for name, column in columns.items()} for row in range(len(columns["ids"]))]
    sampler = StatefulDistributedSampler(
        rows, num_replicas=task.WORLD_SIZE, rank=task.RANK, shuffle=split == "train", seed=task.SEED
    )
    return StatefulDataLoader(rows, batch_size=TASK.batch_size, sampler=sampler)


TASK = task.Task()
lightning.seed_everything(task.SEED)
checkpoints = ModelCheckpoint(
    dirpath=TASK.run_dir,
    every_n_train_steps=task.SAVE_EVERY,
    save_top_k=-1,
    save_last=True,
    save_on_exception=True,
)
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=task.WORLD_SIZE,
    strategy="ddp" if task.WORLD_SIZE > 1 else "auto",
    max_epochs=task.NUM_EPOCHS,
    val_check_interval=task.EVAL_EVERY,
    num_sanity_val_steps=0,
    use_distributed_sampler=False,
    callbacks=[checkpoints, Saving()],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=TASK.run_dir,
)
module = Module()
trainer.fit(module, loader("train"), loader("eval"), ckpt_path="last")
if trainer.state.finished:
    TASK.finish(module.state_dict())
