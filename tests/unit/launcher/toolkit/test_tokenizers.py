"""Tokenizers: exact round trips, identical in every process and when loaded by AutoTokenizer."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config, T5Config

from shardlaunch import UserError
from shardlaunch.launcher.toolkit.demo_data import film_reviews
from shardlaunch.text import train_tokenizer

END = "<|endoftext|>"
ODD = "\ufeff Ünï  code 你好\t\r\n\n a . , ' s n't <|endoftext|> \x00 end "


def _texts() -> list[str]:
    return list(film_reviews()["eval"]["text"][:400])


def _trained(kind: Any, texts: list[str]) -> Any:
    roles = {"pad_token": END, "bos_token": END, "eos_token": END, "unk_token": "<unk>"}
    return train_tokenizer(texts, kind=kind, vocab_size=700, **roles)


@pytest.mark.parametrize("config", [GPT2Config(), T5Config()], ids=lambda config: config.model_type)
@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_exact_round_trip_also_when_loaded(kind: str, config: Any, tmp_path: Path) -> None:
    tokenizer = _trained(kind, [*_texts(), ODD])
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*_texts()[:20], ODD):
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert loaded(text, split_special_tokens=True)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 0, 1)
    assert len(loaded) == len(tokenizer)


def test_bytes_and_characters_not_seen() -> None:
    assert _trained("bpe", ["abc"]).decode(_trained("bpe", ["abc"])("ö\n")["input_ids"]) == "ö\n"
    assert _trained("characters", ["abc"])("aöb")["input_ids"] == [2, 1, 3]


def test_special_tokens_and_their_order() -> None:
    tokens = ("<pad>", "<s>", "</s>", "<unk>", "<de>")
    roles = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), tokens, strict=False))
    tokenizer = train_tokenizer(_texts(), vocab_size=300, special_tokens=tokens[4:], append_eos=True, **roles)
    assert tokenizer.convert_tokens_to_ids(list(tokens)) == [0, 1, 2, 3, 4]
    ids = tokenizer("a film")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a film"


def test_no_room_for_bytes() -> None:
    with pytest.raises(UserError, match="--vocab-size 256: must be at least 257"):
        train_tokenizer(["a"], vocab_size=256, eos_token=END)


def test_the_same_in_every_process() -> None:
    """Texts with many equally frequent pairs; processes with different hash seeds and thread counts."""
    code = (
        "import hashlib, random\n"
        "from shardlaunch.text import train_tokenizer\n"
        "random = random.Random(0)\n"
        "texts = [''.join(random.choices('abcdefghijklmnop ', k=200)) for _ in range(300)]\n"
        "tokenizer = train_tokenizer(texts, vocab_size=1500, eos_token='</s>')\n"
        "print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    one, other = (process.communicate()[0] for process in processes)
    assert one == other
    assert len(one.strip()) == hashlib.sha256().digest_size * 2
