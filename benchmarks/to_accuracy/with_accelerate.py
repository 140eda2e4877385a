"""The task in a loop written by hand, with accelerate."""

import time

import task
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model, optimizer, loader, test_loader = task.loop_parts()
model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)
schedule = task.schedule_of(optimizer, len(loader))
model.train()
begun = time.perf_counter()
for batch in loader:
    accelerator.backward(model(**batch).loss)
    accelerator.clip_grad_norm_(model.parameters(), task.MAX_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
training_s = time.perf_counter() - begun
model.eval()
num_right = num_rows = 0
with torch.no_grad():
    for batch in test_loader:
        found = model(**batch).logits.argmax(-1)
        right, labels = accelerator.gather_for_metrics((found == batch["labels"], batch["labels"]))
        num_right += int(right.sum())
        num_rows += len(labels)
if accelerator.is_main_process:
    task.tell(training_s, num_right / num_rows)
