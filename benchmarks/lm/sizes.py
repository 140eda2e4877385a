"""The language model that all arms of benchmarks/lm_tokens_per_s.py train, and how an arm tells what it took."""

import json
import time

import torch

VOCABULARY, CONTEXT, LAYERS, HEADS, WIDTH, DROPOUT = 8192, 256, 4, 8, 256, 0.1
BATCH_SIZE, MICRO_BATCH_SIZE, RANKS = 16, 8, 2
STEPS, SKIPPED = 16, 4
LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.99), 0.1, 1.0


def blocks() -> torch.Tensor:
    """Return blocks of tokens, as many as the steps need: ids of shape (blocks, tokens)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (STEPS * BATCH_SIZE, CONTEXT), generator=generator)


class Clock:
    """When the first step that counts began, and the last one ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step_ended(self) -> None:
        """Note the end of a step."""
        self.ends.append(time.perf_counter())

    def tell(self) -> None:
        """Print tokens per second, of all ranks."""
        seconds = self.ends[STEPS - 1] - self.ends[SKIPPED - 1]
        print(json.dumps({"tokens_per_s": (STEPS - SKIPPED) * BATCH_SIZE * CONTEXT / seconds}), flush=True)
