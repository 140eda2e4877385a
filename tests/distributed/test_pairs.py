"""Embeddings of pairs: negatives are those of the whole global batch, scores are those of transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from shardlaunch.checkpoints.verifying import verify
from shardlaunch.launcher.commands.trained import open_run
from shardlaunch.launcher.toolkit.retrieval_metrics import retrieval_metrics
from shardlaunch.launcher.toolkit.text_pairs import pooled
from shardlaunch.recipes.embed_pairs import EmbedPairs
from tests.recipes import losses, run_quietly, run_well, save_small_bert, training_lines

WORDS = ["film", "war", "love", "dog", "king", "night", "house", "road"]
ARGV = ["--max-steps", "3", "--global-batch-size", "12", "--tracker", "none", "--threads-per-rank", "1"]
ARGV += ["--micro-batch-size", "4", "--order", "sequential"]  # not by length, as micro-batches of another size are
COLUMNS = ["--anchor-column", "anchor", "--positive-column", "positive", "--max-length", "12", "--lr", "0.001"]


def rows(count: int) -> list[dict[str, str]]:
    return [
        {
            "anchor": f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {i}",
            "positive": f"the {WORDS[i % 8]} of {WORDS[i // 8 % 8]}",  # repeats after 64 rows
            "negative": f"no {WORDS[(i + 3) % 8]} {i}",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bert"
    save_small_bert(folder)
    config = json.loads((folder / "config.json").read_text())
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # drawn per micro-batch
    (folder / "config.json").write_text(json.dumps({**config, **without}))
    return folder


def _write(folder: Path, train: list[Any], held_out: list[Any]) -> Path:
    folder.mkdir()
    for name, data in (("train", train), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return folder


def test_the_size_of_micro_batches_changes_nothing(model: Path, tmp_path: Path) -> None:
    """All pairs of the global batch are negatives, however it is divided; the scores are those of transformers."""
    data = _write(tmp_path / "data", rows(80), rows(20))
    argv = [*ARGV, *COLUMNS, "--model", str(model), "--data", str(data), "--negative-column", "negative"]
    found = {}
    for size in ("12", "4"):
        run = tmp_path / size
        output = run_well(EmbedPairs, [*argv, "--micro-batch-size", size, "--output-dir", str(run)])
        found[size] = losses(run)
    assert max(abs(found["12"][step] - found["4"][step]) for step in (1, 2, 3)) < 1e-5
    assert abs(found["4"][1] - found["4"][3]) > 1e-3
    assert "16 of 80 texts 'positive' of the train data repeat another" in " ".join(output.split())
    last = [line for line in training_lines(tmp_path / "4") if "eval/loss" in line][-1]
    checkpoint = max((tmp_path / "4" / "checkpoints").iterdir())
    loaded, info = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts, vectors = [], []
    for row in rows(20):
        with torch.no_grad():
            inputs = [tokenizer(row[role], return_tensors="pt") for role in ("anchor", "positive", "negative")]
            states = [loaded.eval()(**one).last_hidden_state for one in inputs]
        pairs = zip(states, inputs, strict=True)
        vectors.append(torch.cat([pooled(one, its["attention_mask"], pooling="mean") for one, its in pairs]))
        texts.append([hash(row[role]) for role in ("anchor", "positive", "negative")])
    for name, metric in retrieval_metrics().items():
        metric.update(torch.tensor(texts), torch.stack(vectors).unbind(dim=1))
        assert last[f"eval/{name}"] == pytest.approx(metric.compute().item(), abs=1e-6), name


@pytest.fixture(scope="module")
def embedder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], torch.Tensor]:
    """Return a checkpoint, texts, and the embeddings of these by the recipe, which pools otherwise than by default."""
    folder = tmp_path_factory.mktemp("embedder")
    data = _write(folder / "data", rows(40), rows(20))
    argv = [*ARGV, *COLUMNS, "--model", str(model), "--data", str(data), "--pooling", "cls", "--output-dir"]
    prefixes = ["--anchor-prefix", "who: ", "--positive-prefix", "it: "]
    output = run_well(EmbedPairs, [*argv, str(folder / "run"), *prefixes, "--max-steps", "1"])
    assert "from sentence_transformers import SentenceTransformer" in output
    run = open_run(folder / "run", step=None, recipe_path="embed_pairs", warn=pytest.fail, on_cpu=True)
    split = run.load_data().splits["eval"]
    with torch.no_grad():
        batch = run.recipe.collate([split[index] for index in range(20)], None)
        _, anchors, positives = run.recipe.forward(run.model(), batch)
    texts = [f"who: {row['anchor']}" for row in rows(20)] + [f"it: {row['positive']}" for row in rows(20)]
    return run.where, texts, torch.cat((anchors, positives))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_checkpoint_says_how_its_embeddings_are_made(embedder: tuple[Path, list[str], torch.Tensor]) -> None:
    folder, texts, expected = embedder
    modules = _read(folder / "modules.json")
    assert [(one["idx"], one["name"]) for one in modules] == [(0, "0"), (1, "1"), (2, "2")]
    kinds = [one["type"].removeprefix("sentence_transformers.models.") for one in modules]
    assert kinds == ["Transformer", "Pooling", "Normalize"]
    transformer, pooling = (folder / one["path"] for one in modules[:2])
    config = _read(pooling / "config.json")
    assert [name for name, value in config.items() if value is True] == ["pooling_mode_cls_token"]
    longest = _read(transformer / "sentence_bert_config.json")["max_seq_length"]
    assert longest == 12
    assert _read(folder / "config_sentence_transformers.json")["prompts"] == {"query": "who: ", "document": "it: "}
    tokenizer, encoder = AutoTokenizer.from_pretrained(transformer), AutoModel.from_pretrained(transformer).eval()
    inputs = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
    with torch.no_grad():
        first = encoder(**inputs).last_hidden_state[:, 0]
    assert first.shape[1] == config["word_embedding_dimension"]
    torch.testing.assert_close(first / first.norm(dim=1, keepdim=True), expected, rtol=0, atol=1e-5)
    verdict = verify(folder)
    assert (verdict.is_valid, verdict.unlisted) == (True, ())


def test_sentence_transformers_loads_a_checkpoint_as_it_stands(
    embedder: tuple[Path, list[str], torch.Tensor],
) -> None:
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder, texts, expected = embedder
    loaded = package.SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(torch.from_numpy(loaded.encode(texts)), expected, rtol=0, atol=1e-5)
    query = torch.from_numpy(loaded.encode([rows(1)[0]["anchor"]], prompt_name="query"))
    torch.testing.assert_close(query, expected[:1], rtol=0, atol=1e-5)


MODULES = [
    {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for number, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
]
DENSE = [*MODULES, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
MAX, FIRST = {"pooling_mode_max_tokens": True}, {"pooling_mode": "cls"}


@pytest.mark.parametrize(
    ("modules", "pooling", "options", "complaint"),
    [
        (
            MODULES,
            FIRST,
            (),
            "its embeddings are made by cls pooling; set --pooling cls, or set --pooling mean to train",
        ),
        (MODULES, MAX, (), "its embeddings are made by max pooling; choose another --model, or set --pooling mean"),
        (MODULES, MAX | {"pooling_mode_mean_tokens": True}, (), "made by mean, max pooling; choose another --model"),
        (DENSE, {}, ("--pooling", "mean"), "makes its embeddings with Dense, which this recipe would leave out"),
        (MODULES[:1], {}, (), "makes its embeddings with no pooling, which this recipe would leave out"),
        ({"a": 1}, {}, (), "modules.json and what it names are not as sentence-transformers writes them"),
        (MODULES, {"include_prompt": False}, ("--anchor-prefix", "q: "), "leaves prefixes out of its embeddings"),
    ],
)
def test_a_model_that_makes_embeddings_otherwise_is_refused(
    modules: Any, pooling: Any, options: tuple[str, ...], complaint: str, model: Path, tmp_path: Path
) -> None:
    status, output = _with_embedder(model, tmp_path, modules, pooling, *options)
    assert (status, complaint in output) == (2, True), output


def test_a_pooling_that_is_chosen_and_prompts_that_are_not_used_are_said(model: Path, tmp_path: Path) -> None:
    status, output = _with_embedder(model, tmp_path, MODULES, FIRST, "--pooling", "mean")
    assert status == 0
    assert "its embeddings are made by cls pooling, here by mean" in output
    assert "has prompts, of which none is used (query: 'q: ')" in output
    status, output = _with_embedder(model, tmp_path / "2", MODULES, FIRST, "--pooling", "cls", "--anchor-prefix", "q: ")
    assert status == 0
    assert "warning" not in output


def _with_embedder(model: Path, folder: Path, modules: Any, pooling: Any, *options: str) -> tuple[int, str]:
    """Run a step from a model folder that says how its embeddings are made; return status and output."""
    copied = shutil.copytree(model, folder / "model")
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (copied / "modules.json").write_text(json.dumps(modules))
    (copied / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: ", "document": ""}}')
    data = _write(folder / "data", rows(12), rows(4))
    argv = [*ARGV, *COLUMNS, "--max-steps", "1", "--model", str(copied), "--data", str(data), *options]
    status, output = run_quietly(EmbedPairs, [*argv, "--output-dir", str(folder / "run")])
    return status, " ".join(output.split())


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({"anchor": " "}, (), "row 3 of the train data has an empty 'anchor'; remove it"),
        ({"anchor": None}, (), "is without a 'anchor'"),
        ({}, ("--positive-column", "anchor"), "--anchor-column and --positive-column: must be different columns"),
        ({}, ("--negative-column", "other"), "the train data has no column 'other'"),
        ({}, ("--max-length", "2"), "--max-length 2: must be at least 3"),
    ],
)
def test_bad_pairs(change: Any, options: tuple[str, ...], complaint: str, model: Path, tmp_path: Path) -> None:
    train = rows(12)
    train[2] = {**train[2], **change}
    data = _write(tmp_path / "data", train, rows(4))
    argv = [*ARGV, *COLUMNS, "--model", str(model), "--data", str(data), *options]
    status, output = run_quietly(EmbedPairs, [*argv, "--output-dir", str(tmp_path / "run")])
    assert (status, complaint in " ".join(output.split())) == (2, True), output
