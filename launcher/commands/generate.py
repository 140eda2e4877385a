"""`shardlaunch generate`: text from a language model checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.adapters import model_of
from shardlaunch.launcher.commands.text_models import all_texts, in_use, loaded, open_text_model
from shardlaunch.launcher.toolkit.packing import document_frame


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: at temperature 0 greedily or by beam search, above 0 by sampling.

    0 beams: as many as the checkpoint's generation config says.
    """

    temperature: float = 0.0
    top_k: int = 0
    num_beams: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # NaN is neither
            raise UserError(f"--temperature {self.temperature}: must be at least 0, and finite")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be at least 1, or 0 for all tokens")
        if self.num_beams < 0:
            raise UserError(f"--num-beams {self.num_beams}: must be at least 1, or 0 for the checkpoint's own")
        if self.top_k and not self.temperature:
            raise UserError(f"--top-k {self.top_k} only affects sampling: set --temperature above 0")
        if self.num_beams > 1 and self.temperature:
            raise UserError(f"--num-beams {self.num_beams}: beam search does not sample: remove --temperature")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for a model's generate()."""
        if not self.temperature:
            return {"do_sample": False, **({"num_beams": self.num_beams} if self.num_beams else {})}
        return {"do_sample": True, "num_beams": 1, "temperature": self.temperature, "top_k": self.top_k}


def generate_texts(
    path: Path,
    *,
    prompts: Sequence[str],
    file: Path | None,
    max_new_tokens: int,
    sampling: Sampling,
    ema: bool = False,
    chat: bool = False,
) -> None:
    """Print each prompt's continuation, with `chat` the answer to it, or the output of an encoder-decoder for it.

    A text does not depend on the prompts before it. With `ema`, the model has the average of its weights. Raises
    UserError when there is no prompt, or no valid checkpoint of a language model.
    """
    check_length(max_new_tokens)
    prompts = all_texts(prompts, file, flag="--prompt")
    writer = open_writer(path, ema=ema)
    for prompt in prompts:
        print((writer.answer if chat else writer.text)(prompt, max_new_tokens, sampling))


def check_length(max_new_tokens: int) -> None:
    """Raise UserError for a number of tokens that is none."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A language model of a checkpoint."""

    checkpoint: Checkpoint
    tokenizer: Any
    model: Any

    def text(self, prompt: str, max_new_tokens: int, sampling: Sampling) -> str:
        """Return a prompt's continuation, or the output of an encoder-decoder for it."""
        generate = _transform if self.model.config.is_encoder_decoder else _continue
        torch.manual_seed(sampling.seed)
        with torch.no_grad(), in_use(self.checkpoint):
            return generate(self.model, self.tokenizer, prompt, max_new_tokens, sampling.arguments())

    def answer(self, prompt: str, max_new_tokens: int, sampling: Sampling) -> str:
        """Return the answer to a user's message. Raises UserError for a model without a chat template."""
        if self.model.config.is_encoder_decoder or not self.tokenizer.chat_template:
            raise UserError(
                f"--chat: the tokenizer of {self.checkpoint.step_dir} has no chat template; remove it, or tune the "
                f"model on conversations (gpt_lm --messages-column)"
            )
        torch.manual_seed(sampling.seed)
        with torch.no_grad(), in_use(self.checkpoint):
            message = [{"role": "user", "content": prompt}]
            tokens = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            written = _written(self.model, self.tokenizer, tokens, max_new_tokens, sampling.arguments())
            return str(self.tokenizer.decode(written[len(tokens) :], skip_special_tokens=True))


def open_writer(path: Path, *, ema: bool) -> Writer:
    """Return the language model of a checkpoint. Raises UserError where there is none."""
    checkpoint, tokenizer = open_text_model(path, kind="language model")
    return Writer(checkpoint=checkpoint, tokenizer=tokenizer, model=_language_model(checkpoint, ema=ema))


def _language_model(checkpoint: Checkpoint, *, ema: bool) -> Any:
    """Load the model of a checkpoint. Raises UserError when it is not a language model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    is_encoder_decoder = loaded(checkpoint, AutoConfig, kind="language model").is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return model_of(checkpoint, auto_class, kind="language model", ema=ema)


def _transform(model: Any, tokenizer: Any, text: str, max_new_tokens: int, arguments: dict[str, Any]) -> str:
    """Return the output of an encoder-decoder for a text."""
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    num_tokens = inputs["input_ids"].shape[1]
    longest = _num_positions(model, num_tokens + max_new_tokens)
    if num_tokens > longest:
        raise UserError(f"the model takes at most {longest} tokens, but the prompt has {num_tokens}: {text[:40]!r}...")
    tokens = model.generate(**inputs, max_new_tokens=min(max_new_tokens, longest - 1), **arguments)[0]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _continue(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, arguments: dict[str, Any]) -> str:
    """Return the prompt and its continuation."""
    start, _ = document_frame(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id  # for GPT-2's tokenizer, which knows all text, it is the end-of-text token
    if unknown in ids and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise UserError(f"the prompt has characters that the model's tokenizer does not know: {prompt!r}")
    tokens = [*start, *ids]
    if not tokens:
        raise UserError("the prompt is empty, and the model has no token that starts a text: give a non-empty prompt")
    tokens = _written(model, tokenizer, tokens, max_new_tokens, arguments)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _written(
    model: Any, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int, arguments: dict[str, Any]
) -> list[int]:
    """Return a prompt's tokens and those that follow. When the context is full, continue from its second half."""
    tokens, (_, end) = [*prompt], document_frame(tokenizer)
    longest = _num_positions(model, len(tokens) + max_new_tokens)
    num_left = max_new_tokens
    while num_left:
        context = torch.tensor([tokens[-max(longest - num_left, longest // 2, 1) :]])
        num_new = min(num_left, longest + 1 - context.shape[1])
        mask = torch.ones_like(context)
        new = model.generate(context, attention_mask=mask, max_new_tokens=num_new, **arguments)[0, context.shape[1] :]
        tokens += new.tolist()
        num_left -= num_new
        if len(new) < num_new or tokens[-1:] == end:
            break
    return tokens


def _num_positions(model: Any, default: int) -> int:
    """Return the model's maximum number of tokens, or `default` if it has no limit."""
    return getattr(model.config, "max_position_embeddings", None) or default
