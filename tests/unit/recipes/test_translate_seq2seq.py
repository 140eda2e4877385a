"""The encoder-decoder recipe: contents of a batch and a loss, and unsuitable data and models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from shardlaunch import UserError
from shardlaunch.demo import toy_translations
from shardlaunch.recipes.translate_seq2seq import TranslateOptions, TranslateSeq2Seq
from shardlaunch.text import tokenizer_key
from tests.recipes import run_well, save_small_bert, save_small_t5

PAIRS = [{"de": f"Ein Hund, {number} Katzen.", "en": f"A dog, {number} cats."} for number in range(8)]


def _recipe(folder: Path, rows: list[dict[str, Any]] = PAIRS, **options: Any) -> TranslateSeq2Seq:
    """Return the recipe with the given rows as training data and valid evaluation data."""
    folder = folder / "data"
    folder.mkdir(exist_ok=True)
    for name, its_rows in (("train", rows), ("test", PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in its_rows))
    small = {} if "model" in options else {"vocab_size": 300, "layers": 1, "width": 16}
    return TranslateSeq2Seq(TranslateOptions(data=str(folder), **small, **options))


def test_batch(tmp_path: Path) -> None:
    """Sources and targets end with the EOS token and are padded; metrics compare with the full text."""
    recipe = _recipe(tmp_path, max_target_length=4, source_prefix="übersetze: ")
    splits = recipe.datasets()
    batch = recipe.collate(splits["eval"].__getitems__([0, 7]), None)
    tokenizer = recipe.tokenizer
    assert batch["references"] == ["A dog, 0 cats.", "A dog, 7 cats."]
    assert tokenizer.decode(batch["input_ids"][1]) == "übersetze: Ein Hund, 7 Katzen.</s>"
    assert batch["labels"].shape == (2, 4)
    assert batch["labels"][0, -1] == tokenizer.eos_token_id
    assert recipe.num_targets(batch) == 8
    assert recipe.num_tokens(batch) == 8 + batch["attention_mask"].sum()
    assert splits["train"]["length"][0] == len(splits["train"]["input_ids"][0]) + 4
    assert "references" not in recipe.collate(splits["train"].__getitems__([0, 7]), torch.zeros(2).numpy())


def test_loss_is_smoothed_in_training_only() -> None:
    recipe = TranslateSeq2Seq(TranslateOptions(label_smoothing=0.2))
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100], [6, -100, -100]])
    log_probabilities = logits.double().log_softmax(dim=-1)[[0, 0, 1], [0, 1, 0]]
    true = -log_probabilities[[0, 1, 2], [1, 2, 6]].sum()
    smoothed = 0.8 * true - 0.2 * log_probabilities.mean(dim=-1).sum()
    assert recipe.loss((logits, None), {"labels": labels}).item() == pytest.approx(smoothed.item(), rel=1e-6)
    generated = torch.zeros(2, 1)
    assert recipe.loss((logits, generated), {"labels": labels}).item() == pytest.approx(true.item(), rel=1e-6)


def test_evaluation_split_and_nested_columns(tmp_path: Path) -> None:
    rows = [{"translation": pair} for pair in PAIRS]
    for name, count in (("train", 8), ("validation", 1), ("test", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    options = {"data": str(tmp_path), "source_column": "translation.de", "target_column": "translation.en"}
    splits = TranslateSeq2Seq(TranslateOptions(**options, eval_split="test", vocab_size=300)).datasets()
    assert splits["eval"]["target"][2] == "A dog, 2 cats."
    with pytest.raises(UserError, match=r"--eval-split dev: .* has test, train, validation|train, validation, test"):
        TranslateSeq2Seq(TranslateOptions(**options, eval_split="dev")).datasets()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_column": "fr"}, r"no column 'fr'.*--target-column NAME"),
        ({"target_column": "de"}, r"--source-column and --target-column: must be different"),
        ({"vocab_size": 200}, r"--vocab-size 200: must be at least"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    recipe = _recipe(tmp_path)
    with pytest.raises(UserError, match=message):
        TranslateSeq2Seq(TranslateOptions(**{"data": recipe.options.data, **options})).datasets()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"--width 256 is not a multiple of twice --heads 3"),
        ({"label_smoothing": 1.0}, r"--label-smoothing 1.0"),
        ({"num_beams": 0}, r"--num-beams 0"),
        ({"metrics": ()}, r"--metrics"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TranslateOptions(**options)


@pytest.mark.parametrize("bad", [{"de": "Ein Hund."}, {"de": "Ein Hund.", "en": None}, {"de": " ", "en": "A dog."}])
def test_unpaired_rows(tmp_path: Path, bad: dict[str, Any]) -> None:
    says = "row 5 of the train data has no text 'de'" if bad.get("en") else "train.jsonl: row 6 is without a 'en'"
    with pytest.raises(UserError, match=says):
        _recipe(tmp_path, [*PAIRS[:5], bad, *PAIRS[5:]]).datasets()


def test_model_without_decoder(tmp_path: Path) -> None:
    save_small_bert(tmp_path / "bert")
    recipe = _recipe(tmp_path, model=str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"model type 'bert' is not an encoder-decoder"):
        recipe.datasets()


def test_pretrained_model(tmp_path: Path) -> None:
    """Its weights and generation settings are used, except for beams and length."""
    save_small_t5(tmp_path / "t5")
    recipe = _recipe(tmp_path, model=str(tmp_path / "t5"), num_beams=3, max_target_length=9)
    recipe.datasets()
    model: Any = recipe.model()
    assert set(recipe.weights()) >= {name for name, _ in model.named_parameters()}
    generation = model.generation_config
    assert (generation.length_penalty, generation.num_beams, generation.max_new_tokens) == (2.5, 3, 9)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_models_settings_that_the_search_does_not_have(num_beams: int, tmp_path: Path) -> None:
    """They are removed; otherwise transformers refuses to save them with the first checkpoint."""
    save_small_t5(tmp_path / "t5")
    path = tmp_path / "t5" / "generation_config.json"
    settings = {"early_stopping": True, "do_sample": True, "top_k": 7, "temperature": 0.5, "min_length": 5}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    recipe = _recipe(tmp_path, model=str(tmp_path / "t5"), num_beams=num_beams)
    recipe.datasets()
    model: Any = recipe.model()
    recipe.export(tmp_path / "saved", model)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    beams = {"early_stopping", "length_penalty"} & saved.keys()
    assert (saved["num_beams"], len(beams), saved["do_sample"]) == (num_beams, 2 if num_beams > 1 else 0, False)
    recipe = _recipe(tmp_path, model=str(tmp_path / "t5"), max_target_length=4)
    recipe.datasets()
    with pytest.raises(UserError, match="--max-target-length 4: this model generates at least 5 tokens"):
        recipe.model()


def test_limits_without_room_for_a_text(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--max-source-length 1: must be at least 2, including the tokenizer's special tokens"
    ):
        _recipe(tmp_path, max_source_length=1).datasets()


def test_more_tokens_than_positions(tmp_path: Path) -> None:
    save_small_bert(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    recipe = _recipe(tmp_path, model=str(tmp_path / "bert"), max_source_length=600, micro_batch_size=1)
    recipe.datasets()
    with pytest.raises(UserError, match=r"--max-source-length 600 .* at most 512 tokens"):
        recipe.model()


def test_generated_task_holds_out_its_own_sentences() -> None:
    splits = toy_translations()
    assert not set(splits["train"]["de"]) & set(splits["eval"]["de"])
    assert splits["train"][0] == toy_translations()["train"][0]


def test_key_of_a_tokenizer_without_a_backend() -> None:
    from transformers import ByT5Tokenizer

    assert tokenizer_key(ByT5Tokenizer()) == tokenizer_key(ByT5Tokenizer())
    assert tokenizer_key(ByT5Tokenizer()) != tokenizer_key(ByT5Tokenizer(extra_ids=3))


def test_a_model_with_its_own_sizes() -> None:
    options = TranslateOptions(model="google-t5/t5-small", layers=5, width=128, preset="demo")
    with pytest.raises(
        UserError, match=r"^--layers: only for a model from scratch, not with --model google-t5/t5-small"
    ):
        TranslateSeq2Seq(options).datasets()


def test_a_split_that_the_demo_does_not_have() -> None:
    with pytest.raises(UserError, match=r"^--eval-split test: has no effect with --data demo"):
        TranslateSeq2Seq(TranslateOptions(data="demo", eval_split="test")).datasets()
    with pytest.raises(UserError, match=r"^--eval-split test: --folds evaluates on training data"):
        TranslateOptions(eval_split="test", folds=3)


def _save_marian(folder: Path) -> None:
    """Write the folder of a small Marian with a slow tokenizer, as Marian models on the hub have."""
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel

    folder.mkdir()
    (folder / "text").write_text("\n".join(text for pair in PAIRS * 20 for text in pair.values()))
    for side in ("source", "target"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"),
            model_prefix=str(folder / side),
            vocab_size=31,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
    pieces = [line.split("\t")[0] for line in (folder / "source.vocab").read_text().splitlines()]
    words = ["</s>", "<unk>", *(piece for piece in pieces if piece not in ("<s>", "</s>", "<unk>")), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    config = MarianConfig(
        vocab_size=len(words),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=len(words) - 1,
        decoder_start_token_id=len(words) - 1,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    MarianMTModel(config).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_a_marian_with_sentencepiece_is_fine_tuned(tmp_path: Path) -> None:
    _save_marian(tmp_path / "marian")
    (tmp_path / "data").mkdir()
    recipe = _recipe(tmp_path / "data", model=str(tmp_path / "marian"))
    options = ("--max-source-length", "32", "--max-target-length", "32", "--global-batch-size", "4", "--lr", "1e-3")
    argv = ["--model", recipe.options.model, "--data", recipe.options.data, "--output-dir", str(tmp_path / "run")]
    argv += [*options, "--micro-batch-size", "4", "--max-steps", "2", "--tracker", "none"]
    output = run_well(TranslateSeq2Seq, argv)
    assert "bleu   nrefs:1|case:mixed" in output
    assert "chrf   nrefs:1|case:mixed" in output
    again = AutoTokenizer.from_pretrained(max((tmp_path / "run" / "checkpoints").iterdir()))
    assert again("Ein Hund").input_ids == AutoTokenizer.from_pretrained(recipe.options.model)("Ein Hund").input_ids
