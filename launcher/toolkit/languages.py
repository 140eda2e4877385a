"""Tokenizers and models of several languages (mBART, M2M100, NLLB, PLBart): which one is read, which one is written."""

from collections.abc import Mapping
from typing import Any

from shardlaunch.errors import UserError, some


def _codes(tokenizer: Any) -> Mapping[str, int]:
    """Return the ids of a tokenizer's language codes; empty if it has no languages."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    codes = getattr(tokenizer, "lang_code_to_id", None)
    if codes is None:
        codes = {code: tokenizer.convert_tokens_to_ids(code) for code in tokenizer.all_special_tokens if "_" in code}
    return {code: number for code, number in codes.items() if number not in (None, tokenizer.unk_token_id)}


def language_arguments(tokenizer: Any, *, read: str, written: str, source: str) -> dict[str, str]:
    """Return the arguments that load a tokenizer for two languages, none for a tokenizer without languages.

    `read` is the value of --source-language, `written` that of --target-language. Raises UserError when they are
    missing, not known to the tokenizer, or without effect.
    """
    codes = _codes(tokenizer)
    if not codes:
        if read or written:
            raise UserError(
                f"--source-language, --target-language: the tokenizer of --model {source} has no languages; remove the "
                f"options, or name the languages in --source-prefix as the model expects"
            )
        return {}
    known = some(sorted(codes))
    for flag, code in (("--source-language", read), ("--target-language", written)):
        if not code:
            raise UserError(f"--model {source}: is a model of several languages: set {flag} to one of {known}")
        if code not in codes:
            raise UserError(f"{flag} {code}: not a language of --model {source}; it has {known}")
    return {"src_lang": read, "tgt_lang": written}


def write_language(model: Any, tokenizer: Any) -> None:
    """Let a model generate in a tokenizer's target language, and save that with it.

    Where targets begin with their language (mBART-50, M2M100, NLLB), it is forced as the first token; where they end
    with it (mBART, PLBart), the decoder starts with it.
    """
    codes = _codes(tokenizer)
    if not codes:
        return
    language, targets = codes[tokenizer.tgt_lang], tokenizer(text_target="a")["input_ids"]
    if targets[0] == language:
        model.generation_config.forced_bos_token_id = language
    else:
        assert targets[-1] == language
        model.generation_config.forced_bos_token_id = None
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = language
