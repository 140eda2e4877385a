"""Texts: tokenizers, Hugging Face models and their weights, packing, padding, generation."""

from shardlaunch.launcher.toolkit.adapters import adapters_off
from shardlaunch.launcher.toolkit.chats import contents_of, note_longer, set_chat_template, tokenized_chats
from shardlaunch.launcher.toolkit.embedders import check_embedder, save_embedder
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
from shardlaunch.launcher.toolkit.masking import Masking, rows_of_words, seed_of_row
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
from shardlaunch.launcher.toolkit.preferences import tokenized_pairs, usable_pairs
from shardlaunch.launcher.toolkit.pretrained import (
    causal_config,
    from_config,
    from_source,
    longest_input,
    num_labels_to_load,
    prepare_encoder,
    pretrained_weights,
    require_room,
    require_short_inputs,
    save_config,
    tokenizer_key,
    without_dropout,
    word_tokenizer,
)
from shardlaunch.launcher.toolkit.spans import NO_ANSWER, best_spans, exact_match, f1_of_words, question_windows
from shardlaunch.launcher.toolkit.tags import numbered_tags, tagged_tokens
from shardlaunch.launcher.toolkit.text_pairs import pooled, ranking_loss, tokenized_texts
from shardlaunch.launcher.toolkit.tokenizers import train_tokenizer

__all__ = [
    "CLASSIFIERS",
    "NO_ANSWER",
    "NO_TARGET",
    "TRANSLATORS",
    "Masking",
    "adapters_off",
    "best_spans",
    "causal_config",
    "check_embedder",
    "contents_of",
    "cut_blocks",
    "exact_match",
    "f1_of_words",
    "from_config",
    "from_source",
    "generate",
    "language_arguments",
    "longest_input",
    "note_longer",
    "num_labels_to_load",
    "numbered_tags",
    "pack",
    "padded",
    "pooled",
    "positions",
    "prepare_encoder",
    "prepare_head",
    "prepare_padding",
    "pretrained_weights",
    "question_windows",
    "ranking_loss",
    "require_logits_of_head",
    "require_no_effect_of_padding",
    "require_room",
    "require_short_inputs",
    "require_vocabulary",
    "rows_of_documents",
    "rows_of_words",
    "save_config",
    "save_embedder",
    "seed_of_row",
    "set_chat_template",
    "set_search",
    "shifted_right",
    "sum_of_losses",
    "tagged_tokens",
    "tokenized",
    "tokenized_chats",
    "tokenized_pairs",
    "tokenized_texts",
    "tokenizer_key",
    "train_tokenizer",
    "usable_pairs",
    "without_dropout",
    "word_tokenizer",
    "write_language",
]
