"""GPT-2 of transformers on packed blocks of tokens, with its Trainer."""

import os

import sizes
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Speed(TrainerCallback):
    """When steps ended."""

    def __init__(self):
        self.clock = sizes.Clock()

    def on_step_end(self, args, state, control, **others):
        self.clock.step_ended()


config = GPT2Config(
    vocab_size=sizes.VOCABULARY,
    n_positions=sizes.CONTEXT,
    n_embd=sizes.WIDTH,
    n_layer=sizes.LAYERS,
    n_head=sizes.HEADS,
    activation_function="gelu_pytorch_tanh",
    embd_pdrop=sizes.DROPOUT,
    resid_pdrop=sizes.DROPOUT,
    attn_pdrop=0.0,
)
speed = Speed()
arguments = TrainingArguments(
    output_dir=os.environ["OUTPUT_DIR"],
    max_steps=sizes.STEPS,
    per_device_train_batch_size=sizes.MICRO_BATCH_SIZE,
    learning_rate=sizes.LEARNING_RATE,
    adam_beta2=sizes.BETAS[1],
    weight_decay=sizes.WEIGHT_DECAY,
    max_grad_norm=sizes.MAX_NORM,
    lr_scheduler_type="cosine",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
blocks = [{"input_ids": ids, "labels": ids} for ids in sizes.blocks()]
Trainer(GPT2LMHeadModel(config), arguments, train_dataset=blocks, callbacks=[speed]).train()
if os.environ["RANK"] == "0":
    speed.clock.tell()
