"""A GPT of plain PyTorch in a loop written by hand, with DDP, as short repositories for pretraining have it."""

import os

import sizes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Block(nn.Module):
    """Attention and a perceptron, each added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        width = sizes.WIDTH
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = hidden.shape
        parts = self.qkv(self.before_attention(hidden)).split(width, dim=2)
        q, k, v = (part.view(rows, tokens, sizes.HEADS, -1).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, tokens, width)
        hidden = hidden + F.dropout(self.out(seen), sizes.DROPOUT, self.training)
        return hidden + F.dropout(self.mlp(self.before_mlp(hidden)), sizes.DROPOUT, self.training)


class Gpt(nn.Module):
    """A GPT that returns the mean loss of its blocks of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.VOCABULARY, sizes.WIDTH)
        self.positions = nn.Embedding(sizes.CONTEXT, sizes.WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(sizes.LAYERS)))
        self.norm = nn.LayerNorm(sizes.WIDTH)
        self.head = nn.Linear(sizes.WIDTH, sizes.VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        logits = self.head(self.norm(self.blocks(F.dropout(hidden, sizes.DROPOUT, self.training))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(Gpt())
optimizer = torch.optim.AdamW(
    model.parameters(), sizes.LEARNING_RATE, betas=sizes.BETAS, weight_decay=sizes.WEIGHT_DECAY, fused=True
)
clock = sizes.Clock()
mine = sizes.blocks()[int(os.environ["RANK"]) :: sizes.RANKS].split(sizes.MICRO_BATCH_SIZE)
for ids in mine:
    model(ids).backward()
    nn.utils.clip_grad_norm_(model.parameters(), sizes.MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    clock.step_ended()
if os.environ["RANK"] == "0":
    clock.tell()
dist.destroy_process_group()
