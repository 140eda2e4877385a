"""Texts: tokenizers, Hugging Face models and their weights, packing, padding, generation."""

from shardlaunch.launcher.toolkit.chats import note_longer, tokenized_chats
from shardlaunch.launcher.toolkit.families import (
    CLASSIFIERS,
    TRANSLATORS,
    prepare_padding,
    require_no_effect_of_padding,
    require_vocabulary,
)
from shardlaunch.launcher.toolkit.generation import generate, set_search
from shardlaunch.launcher.toolkit.head_loss import prepare_head, require_logits_of_head, sum_of_losses
from shardlaunch.launcher.toolkit.languages import language_arguments, write_language
from shardlaunch.launcher.toolkit.packing import (
    NO_TARGET,
    cut_blocks,
    pack,
    padded,
    positions,
    rows_of_documents,
    shifted_right,
    tokenized,
)
from shardlaunch.launcher.toolkit.pretrained import (
    causal_config,
    from_config,
    from_source,
    longest_input,
    num_labels_to_load,
    pretrained_weights,
    require_room,
    save_config,
    tokenizer_key,
)
from shardlaunch.launcher.toolkit.tokenizers import train_tokenizer

__all__ = [
    "CLASSIFIERS",
    "NO_TARGET",
    "TRANSLATORS",
    "causal_config",
    "cut_blocks",
    "from_config",
    "from_source",
    "generate",
    "language_arguments",
    "longest_input",
    "note_longer",
    "num_labels_to_load",
    "pack",
    "padded",
    "positions",
    "prepare_head",
    "prepare_padding",
    "pretrained_weights",
    "require_logits_of_head",
    "require_no_effect_of_padding",
    "require_room",
    "require_vocabulary",
    "rows_of_documents",
    "save_config",
    "set_search",
    "shifted_right",
    "sum_of_losses",
    "tokenized",
    "tokenized_chats",
    "tokenizer_key",
    "train_tokenizer",
    "write_language",
]
