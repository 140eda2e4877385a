"""Models of several languages: the codes are right in training, in the checkpoint and in generation."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.families.comparing import Refused, compare_translator, trained, write_rows
from tests.families.models import WORDS, save_model, save_tokenizer

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "▁")
CODES = {
    "mbart": ("de_DE", "ro_RO"),
    "mbart50": ("de_DE", "ro_RO"),
    "nllb": ("deu_Latn", "ron_Latn"),
    "m2m_100": ("de", "ro"),
}


def _save_tokenizer(folder: Path, name: str) -> None:
    """Write a small tokenizer of the model's own class."""
    from transformers import M2M100Tokenizer, MBart50Tokenizer, MBartTokenizer, NllbTokenizer

    pieces = [(token, 0.0) for token in SPECIALS] + [(f"▁{word}", -1.0) for word in WORDS]
    if name == "nllb":
        letters = sorted(set("".join(WORDS)))
        NllbTokenizer(vocab={token: number for number, token in enumerate((*SPECIALS, *letters))}).save_pretrained(
            folder
        )
    elif name == "m2m_100":
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS)] * 50),
            model_writer=model,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        folder.mkdir()
        (folder / "spm.model").write_bytes(model.getvalue())
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        known = dict.fromkeys((*SPECIALS[:4], *(processor.id_to_piece(i) for i in range(len(processor)))))
        (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(known)}))
        M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model")).save_pretrained(folder)
    else:
        {"mbart": MBartTokenizer, "mbart50": MBart50Tokenizer}[name](vocab=pieces).save_pretrained(folder)


def _save(folder: Path, name: str) -> None:
    _save_tokenizer(folder / "model", name)
    family = "mbart" if name.startswith("mbart") else "m2m_100"
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    save_model(folder / "model", AutoModelForSeq2SeqLM, family, tokenizer=range(300), **ids)
    write_rows(folder)


@pytest.mark.parametrize("name", CODES)
def test_languages(name: str, tmp_path: Path) -> None:
    """Losses and texts are those of plain transformers with the same languages."""
    read, written = CODES[name]
    _save(tmp_path, name)
    checkpoint = compare_translator(tmp_path, "--source-language", read, "--target-language", written)
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == (read, written)
    ids = getattr(tokenizer, "lang_code_to_id", None) or {
        code: tokenizer.convert_tokens_to_ids(code) for code in CODES[name]
    }
    inputs = tokenizer("the film", return_tensors="pt")
    assert ids[read] in inputs["input_ids"]
    assert ids[written] in tokenizer(text_target="the film")["input_ids"]
    begins: Any = model.generate(**inputs, max_new_tokens=2, num_beams=1)[0][: 1 if name == "mbart" else 2]
    assert torch.equal(begins, torch.tensor([ids[written]] if name == "mbart" else [2, ids[written]]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "is a model of several languages: set --source-language to one of"),
        (("--source-language", "de_DE"), "set --target-language to one of"),
        (("--source-language", "de", "--target-language", "en_XX"), "--source-language de: not a language of --model"),
    ],
)
def test_languages_that_are_missing_or_unknown(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    _save(tmp_path, "mbart")
    with pytest.raises(Refused, match=says):
        compare_translator(tmp_path, *options)


def test_a_model_without_languages(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "model", kind="end")
    save_model(tmp_path / "model", AutoModelForSeq2SeqLM, "t5", tokenizer=tokenizer)
    write_rows(tmp_path)
    with pytest.raises(Refused, match="has no languages; remove the options"):
        compare_translator(tmp_path, "--source-language", "de", "--target-language", "en")


@pytest.mark.parametrize(("more", "is_refused"), [(-1, True), (20, False)])
def test_vocabularies_of_other_sizes(more: int, is_refused: bool, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model is refused, one with fewer is fine."""
    tokenizer = save_tokenizer(tmp_path / "model", kind="end")
    save_model(tmp_path / "model", AutoModelForSeq2SeqLM, "t5", tokenizer=range(len(tokenizer) + more))
    write_rows(tmp_path)
    if is_refused:
        with pytest.raises(Refused, match=r"it has 28 tokens, but the tokenizer has 29\. Make room"):
            compare_translator(tmp_path)
    else:
        compare_translator(tmp_path)


def test_a_scratch_model_has_no_languages(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="only for a pretrained model"):
        trained("translate_seq2seq", ["--source-language", "de"], tmp_path / "run")
