"""Texts: tokenizers, Hugging Face models and their weights, packing, padding, generation."""

from shardlaunch.launcher.toolkit.generation import generate, set_search
from shardlaunch.launcher.toolkit.packing import cut_blocks, pack, padded, positions, tokenized
from shardlaunch.launcher.toolkit.pretrained import (
    causal_config,
    from_config,
    from_source,
    longest_input,
    pretrained_weights,
    require_room,
    save_config,
    tokenizer_key,
)
from shardlaunch.launcher.toolkit.tokenizers import train_tokenizer

__all__ = [
    "causal_config",
    "cut_blocks",
    "from_config",
    "from_source",
    "generate",
    "longest_input",
    "pack",
    "padded",
    "positions",
    "pretrained_weights",
    "require_room",
    "save_config",
    "set_search",
    "tokenized",
    "tokenizer_key",
    "train_tokenizer",
]
