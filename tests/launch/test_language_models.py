"""Language models from text to text: inputs of a run, its outputs, and `generate`."""

import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MarianConfig, MarianMTModel, T5Config

from shardlaunch import Options, Recipe, TensorData, UserError
from shardlaunch.data import load_splits
from shardlaunch.launcher.commands.generate import Sampling, generate_texts
from shardlaunch.launcher.commands.main import main
from shardlaunch.launcher.toolkit.demo_data import bert_dir
from shardlaunch.recipes.gpt_lm import GptLm, GptOptions
from shardlaunch.text import train_tokenizer
from tests.recipes import FewReviews, run_quietly, run_well, save_small_bert, training_lines

ONE = ("--tracker", "none", "--threads-per-rank", "1")
STEPS = ("--context-length", "16", "--max-steps", "2", "--global-batch-size", "8", "--micro-batch-size", "4", *ONE)
SMALL = ("--layers", "2", "--heads", "2", "--width", "32")
LINE = "Once more unto the breach, dear friends, once more;\r\n\tOr close the wall up with our English dead.\n\n"


class Echo(Recipe):
    """An encoder-decoder."""

    options: Options

    def datasets(self) -> Mapping[str, Any]:
        roles = {"pad_token": "_", "bos_token": "^", "eos_token": "$", "unk_token": "?"}
        self.tokenizer = train_tokenizer(["ab"], kind="characters", append_eos=True, **roles)
        tokens = torch.tensor(self.tokenizer(["ab", "ba"] * 20)["input_ids"])
        return {"train": TensorData(inputs=tokens, labels=tokens)}

    def model(self) -> nn.Module:
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
        tokens = {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}
        return MarianMTModel(MarianConfig(vocab_size=6, **sizes, **heads, **tokens))

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        shifted = F.pad(batch["labels"], (1, 0), value=1)[:, :-1]
        logits: torch.Tensor = model(input_ids=batch["inputs"], decoder_input_ids=shifted).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def export(self, folder: Path, model: Any) -> None:
        model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, model folders, and a run on characters: characters/."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "long.txt").write_text(LINE * 40, newline="")
    (folder / "short.txt").write_text("To be")
    (folder / "empty.txt").write_text("")
    (folder / "blank.jsonl").write_text('{"text": ""}\n' * 20)
    (folder / "numbers.jsonl").write_text('{"text": 1}\n' * 20)
    (folder / "gaps.csv").write_text("text,other\n" + "a b,a\n,b\n" * 20)
    (folder / "documents.jsonl").write_text("".join(f'{{"body": "Act {n}. {"Enter " * n}"}}\n' for n in range(40)))
    save_small_bert(folder / "bert")
    tokenizer = AutoTokenizer.from_pretrained(bert_dir())
    size = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    for name, config in {
        "gpt": GPT2Config(vocab_size=len(tokenizer), bos_token_id=101, eos_token_id=102, **size),
        "few": GPT2Config(vocab_size=100, **size),
        "t5": T5Config(),
    }.items():
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    argv = [
        "--preset",
        "characters",
        "--data",
        str(folder / "long.txt"),
        *SMALL,
        *STEPS,
        "--output-dir",
        str(folder / "run"),
    ]
    run_well(GptLm, argv)
    return folder / "run"


def test_text_files(folder: Path, tmp_path: Path) -> None:
    """No text is lost, and the last tenth is held out; of several texts, each is a row."""
    splits = load_splits(str(folder / "long.txt"), seed=0)
    (train,), (held_out,) = splits["train"]["text"], splits["eval"]["text"]
    text = (LINE * 40).replace("\r\n", "\n")
    assert train + held_out == text
    assert len(train) == int(0.9 * len(text))
    for name in ("train-1", "train-2", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    splits = load_splits(str(tmp_path), seed=0)
    assert (splits["train"]["text"][:], splits["eval"]["text"][:]) == (["train-1", "train-2"], ["test"])


def test_a_folder_of_texts_under_any_names(tmp_path: Path) -> None:
    """They are documents, of which a tenth is held out; where one names its split, all must."""
    names = sorted(f"chapter {number}" for number in range(20))
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    splits = load_splits(str(tmp_path), seed=0)
    assert sorted(splits["train"]["text"][:] + splits["eval"]["text"][:]) == names
    assert len(splits["eval"]) == 2
    (tmp_path / "test.txt").write_text("test")
    with pytest.raises(UserError, match=r"chapter 0.txt, .* must have a name that starts with train.*Rename it"):
        load_splits(str(tmp_path), seed=0)


def test_metrics_are_those_of_the_whole_text(run_dir: Path, folder: Path) -> None:
    """The run's metrics equal those of the exported model on the held-out text, computed separately."""
    (line,) = [line for line in training_lines(run_dir) if "eval/loss" in line]
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    (text,) = load_splits(str(folder / "long.txt"), seed=0)["eval"]["text"]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"])
    assert len(tokens) == len(text)
    nats = 0.0
    for begin in range(0, len(tokens) - 1, 16):
        block = tokens[begin : begin + 17]
        logits = model(block[None, :-1]).logits[0].detach()
        nats += F.cross_entropy(logits, block[1:], reduction="sum").item()
    num_targets = len(tokens) - 1
    assert line["eval/loss"] == pytest.approx(nats / num_targets, abs=1e-6)
    assert line["eval/perplexity"] == pytest.approx(math.exp(nats / num_targets), rel=1e-5)
    assert line["eval/bits_per_character"] == pytest.approx(nats / num_targets / math.log(2), abs=1e-5)


def test_documents_and_fine_tuning(folder: Path, tmp_path: Path) -> None:
    """Documents of another column with a trained tokenizer; the result is fine-tuned further from its folder."""
    data = ("--data", str(folder / "documents.jsonl"), "--text-column", "body")
    run_well(GptLm, [*data, "--vocab-size", "300", *SMALL, *STEPS, "--output-dir", str(tmp_path / "first")])
    model = tmp_path / "first" / "checkpoints" / "step-00000002"
    output = run_well(GptLm, [*data, "--model", str(model), *STEPS, "--output-dir", str(tmp_path / "second")])
    assert "0 of 28 tensors newly initialized" in output
    lines = [line for name in ("first", "second") for line in training_lines(tmp_path / name)]
    assert lines[3]["loss"] < lines[0]["loss"]
    assert {"eval/perplexity", "eval/bits_per_byte"} < lines[-1].keys()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--data {f}/none.txt", "--data {f}/none.txt: no such file"),
        ("--data {f}/empty.txt", "empty.txt: the file is empty"),
        ("--data {f}/blank.jsonl --tokenizer {f}/bert", "no document in the data has a token to predict"),
        ("--data {f}/short.txt", "--context-length 16: all the training data is shorter"),
        ("--data {f}/documents.jsonl", "no column 'text'; it has 'body'. Choose with --text-column NAME"),
        ("--data {f}/numbers.jsonl", "column 'text' of the train data must hold texts, not Value('int64')"),
        ("--data {f}/gaps.csv", "gaps.csv: row 2 is without a 'text' (an empty cell)"),
        ("--data {f}/long.txt --vocab-size 100", "--vocab-size 100: must be at least 256"),
        ("--data {f}/long.txt --tokenizer {f}", "--tokenizer {f}: not a tokenizer folder"),
        ("--data {f}/long.txt --model {f}", "--model {f}: not a model folder"),
        ("--data {f}/long.txt --model {f}/gpt --context-length 17", "--context-length 17: this model takes at most 16"),
        ("--data {f}/long.txt --model {f}/few", "--model {f}/few: it has 100 tokens, but the tokenizer has 30,522"),
        ("--data {f}/long.txt --model {f}/bert", "--model {f}/bert: model type 'bert' is not a causal language model"),
        ("--data {f}/long.txt --model {f}/t5", "--model {f}/t5: model type 't5' is not a causal language model"),
    ],
)
def test_bad_input(words: str, says: str, folder: Path, tmp_path: Path) -> None:
    argv = [*STEPS, *(word.format(f=folder) for word in words.split()), "--output-dir", str(tmp_path)]
    status, output = run_quietly(GptLm, argv)
    assert status == 2, output
    assert [line.startswith("error: ") for line in output.splitlines()].count(True) == 1, output
    assert "Traceback" not in output
    assert says.format(f=folder) in output, output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 33, "heads": 2}, "--width 33 is not a multiple of --heads 2"),
        ({"layers": 0}, "--layers 0: must be at least 1"),
        (
            {"shift_blocks": True, "folds": 2},
            "--shift-blocks: shifted blocks would overlap those that --folds holds out",
        ),
        ({"dropout": 1.0}, "--dropout 1.0: must be at least 0 and below 1"),
        ({"model": "gpt2", "tokenizer": "bpe"}, "--tokenizer bpe: --model gpt2 already has a vocabulary"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        GptOptions(**options)


def test_a_model_with_its_own_sizes() -> None:
    options = GptOptions(model="gpt2", layers=2, heads=4, width=128, preset="demo")
    with pytest.raises(UserError, match=r"^--layers: only for a model from scratch, not with --model gpt2"):
        GptLm(options).datasets()


def _generated(path: Path, prompts: list[str], capsys: pytest.CaptureFixture[str], *, seed: int = 0) -> str:
    sampling = Sampling(temperature=1.0, top_k=5, seed=seed)
    generate_texts(path, prompts=prompts, file=None, max_new_tokens=40, sampling=sampling)
    return capsys.readouterr().out


def test_generate(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Works past the context of 16 tokens; the text depends only on the prompt and the seed."""
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    one, other = (_generated(checkpoint, [prompt], capsys) for prompt in ("dear ", "the "))
    assert one.startswith("dear ")
    assert len(one) == 5 + 40 + 1
    assert _generated(run_dir, ["dear ", "the "], capsys) == one + other
    assert _generated(run_dir, ["the "], capsys, seed=1) != other


def test_the_command_that_a_run_shows(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(GptLm(GptOptions()).usage(run_dir / "checkpoints" / "step-00000002"))
    monkeypatch.setattr(sys, "argv", [word.replace("The ", "the ") for word in words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("the ")


def test_generate_is_what_the_model_finds_most_probable(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer("breach")["input_ids"]
    for _ in range(8):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    (tmp_path / "prompts").write_text("breach\n\n")
    generate_texts(run_dir, prompts=[], file=tmp_path / "prompts", max_new_tokens=8, sampling=Sampling())
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"
    generate_texts(run_dir, prompts=["breach"], file=None, max_new_tokens=8, sampling=Sampling(num_beams=2))
    assert capsys.readouterr().out.startswith("breach")


def test_generate_with_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is the model's output, without the prompt."""
    run_well(Echo, ["--lr", "0.02", *ONE, "--max-steps", "2", "--output-dir", str(tmp_path / "run")])
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    model, tokenizer = MarianMTModel.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    inputs, said = tokenizer(["ba"], return_tensors="pt")["input_ids"], [1]
    while len(said) < 6 and said[-1] != tokenizer.eos_token_id:
        said.append(int(model(inputs, decoder_input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    generate_texts(tmp_path / "run", prompts=["ba"], file=None, max_new_tokens=5, sampling=Sampling())
    assert capsys.readouterr().out == tokenizer.decode(said, skip_special_tokens=True) + "\n"
    generate_texts(tmp_path / "run", prompts=["ba"], file=None, max_new_tokens=99, sampling=Sampling(num_beams=2))
    with pytest.raises(UserError, match="the model takes at most"):
        generate_texts(tmp_path / "run", prompts=["ab" * 9], file=None, max_new_tokens=9, sampling=Sampling())


def test_what_cannot_generate(folder: Path, run_dir: Path, tmp_path: Path) -> None:
    classifier = tmp_path / "classifier"
    few = ("--preset", "demo", "--model", str(folder / "bert"), "--max-steps", "1", "--max-length", "8")
    run_well(FewReviews, [*few, *ONE, "--output-dir", str(classifier)])
    for path, prompts, options, says in (
        (folder, ["a"], {}, "not a valid checkpoint"),
        (classifier, ["a"], {}, "not a checkpoint of a language model"),
        (run_dir, [], {}, 'no text: give --prompt "..." or --file PATH'),
        (run_dir, [""], {}, "the prompt is empty"),
        (
            run_dir,
            ["\N{SNOWMAN}"],
            {},
            "the prompt has characters that the model's tokenizer does not know: '\N{SNOWMAN}'",
        ),
        (run_dir, ["a"], {"temperature": -1.0}, "--temperature -1.0: must be at least 0"),
        (run_dir, ["a"], {"top_k": 5}, "--top-k 5 only affects sampling"),
        (run_dir, ["a"], {"temperature": 1.0, "num_beams": 2}, "--num-beams 2: beam search does not sample"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            generate_texts(path, prompts=prompts, file=None, max_new_tokens=1, sampling=Sampling(**options))
