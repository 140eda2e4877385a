"""Tokenizers trained on a run's own texts, identical in every process. AutoTokenizer can load them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.phases import phase

Kind = Literal["bpe", "characters"]
NUM_BYTES = 256


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: Kind = "bpe",
    vocab_size: int = 0,
    pad_token: str | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
    unk_token: str | None = None,
    special_tokens: Sequence[str] = (),
    append_eos: bool = False,
) -> Any:
    """Train a tokenizer and return it as a PreTrainedTokenizerFast; its tokens decode to the exact text.

    `bpe`: byte-level BPE of at most `vocab_size` tokens, including one per byte. `characters`: one token per character
    of the texts; others become `unk_token`, which is required. Special tokens have the first ids, in the order pad,
    bos, eos, unk, `special_tokens`; one token may have several roles. With `append_eos`, every encoded text ends with
    `eos_token`. Raises UserError when `vocab_size` is too small for all bytes.
    """
    from tokenizers import AddedToken, decoders, processors
    from transformers import PreTrainedTokenizerFast

    roles = {"pad_token": pad_token, "bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token}
    named = {role: token for role, token in roles.items() if token}
    specials = list(dict.fromkeys((*named.values(), *special_tokens)))
    tokenizer = _byte_level(texts, vocab_size, specials) if kind == "bpe" else _characters(texts, unk_token, specials)
    tokenizer.decoder = decoders.ByteLevel() if kind == "bpe" else decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if append_eos:
        assert eos_token
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {eos_token}",
            pair=f"$A {eos_token} $B {eos_token}",
            special_tokens=[(eos_token, tokenizer.token_to_id(eos_token))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in specials if token not in named.values()],
        **named,
    )


def _byte_level(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < NUM_BYTES + len(specials):
        raise UserError(
            f"--vocab-size {vocab_size}: must be at least {NUM_BYTES + len(specials)}, "
            f"for {NUM_BYTES} bytes and {len(specials)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with phase("training the tokenizer"):
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _characters(texts: Iterable[str], unk_token: str | None, specials: list[str]) -> Any:
    from tokenizers import Tokenizer, models

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {token: number for number, token in enumerate((*specials, *sorted(characters)))}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unk_token))
