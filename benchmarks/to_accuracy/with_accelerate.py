"""The task in a loop written by hand, with accelerate."""

import time

import task
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

accelerator = Accelerator(cpu=True)
collate = DataCollatorWithPadding(task.tokenizer())
model = task.model()
torch.manual_seed(task.SEED)
loader = DataLoader(task.rows("train"), task.BATCH_SIZE // task.RANKS, shuffle=True, collate_fn=collate)
test_loader = DataLoader(task.rows("test"), 32, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), task.LEARNING_RATE, weight_decay=task.WEIGHT_DECAY)
model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)
num_steps = len(loader)
schedule = get_linear_schedule_with_warmup(optimizer, int(task.WARMUP * num_steps), num_steps)
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
