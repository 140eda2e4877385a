"""The task in a loop written by hand, with Lightning Fabric."""

import time

import task
import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

fabric = Fabric(accelerator="cpu", devices=task.RANKS, strategy="ddp")
fabric.launch()
collate = DataCollatorWithPadding(task.tokenizer())
model = task.model()
torch.manual_seed(task.SEED)
loader = DataLoader(task.rows("train"), task.BATCH_SIZE // task.RANKS, shuffle=True, collate_fn=collate)
test_loader = DataLoader(task.rows("test"), 32, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), task.LEARNING_RATE, weight_decay=task.WEIGHT_DECAY)
model, optimizer = fabric.setup(model, optimizer)
loader, test_loader = fabric.setup_dataloaders(loader, test_loader)
num_steps = len(loader)
schedule = get_linear_schedule_with_warmup(optimizer, int(task.WARMUP * num_steps), num_steps)
model.train()
begun = time.perf_counter()
for batch in loader:
    fabric.backward(model(**batch).loss)
    fabric.clip_gradients(model, optimizer, max_norm=task.MAX_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
training_s = time.perf_counter() - begun
model.eval()
sums = torch.zeros(2)
with torch.no_grad():
    for batch in test_loader:
        right = model(**batch).logits.argmax(-1) == batch["labels"]
        sums += torch.tensor([int(right.sum()), len(right)])
sums = fabric.all_reduce(sums, reduce_op="sum")
if fabric.global_rank == 0:
    task.tell(training_s, float(sums[0] / sums[1]))
