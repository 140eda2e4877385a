"""The task in a loop written by hand, with Lightning Fabric."""

import time

import task
import torch
from lightning.fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=task.RANKS, strategy="ddp")
fabric.launch()
model, optimizer, loader, test_loader = task.loop_parts()
model, optimizer = fabric.setup(model, optimizer)
loader, test_loader = fabric.setup_dataloaders(loader, test_loader)
schedule = task.schedule_of(optimizer, len(loader))
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
