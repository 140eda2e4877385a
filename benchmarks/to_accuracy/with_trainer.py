"""The task with transformers' Trainer. The fourth argument says how it draws samples: random, group_by_length."""

import os
import sys
import time

import numpy as np
import task
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """When the first step began, and the last one ended."""

    def on_step_begin(self, args, state, control, **others):
        self.begun = getattr(self, "begun", time.perf_counter())

    def on_step_end(self, args, state, control, **others):
        self.ended = time.perf_counter()


clock = Clock()
arguments = TrainingArguments(
    output_dir=str(task.DATA.with_name("trainer")),
    num_train_epochs=1,
    per_device_train_batch_size=task.BATCH_SIZE // task.RANKS,
    per_device_eval_batch_size=32,
    learning_rate=task.LEARNING_RATE,
    weight_decay=task.WEIGHT_DECAY,
    max_grad_norm=task.MAX_NORM,
    warmup_steps=task.WARMUP,
    train_sampling_strategy=sys.argv[4],
    seed=task.SEED,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(
    task.model(),
    arguments,
    train_dataset=task.rows("train"),
    eval_dataset=task.rows("test"),
    data_collator=DataCollatorWithPadding(task.tokenizer()),
    compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
    callbacks=[clock],
)
trainer.train()
accuracy = trainer.evaluate()["eval_accuracy"]
if os.environ["RANK"] == "0":
    task.tell(clock.ended - clock.begun, accuracy)
