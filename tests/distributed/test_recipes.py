"""Every recipe on a tiny sample of its demo data: the same run on 1 and 2 ranks, exact resumes, open checkpoints."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from shardlaunch import Recipe, TensorData
from shardlaunch.checkpoints.layout import step_dir_name
from shardlaunch.demo import film_chats
from tests.distributed.ranks import run_on_ranks
from tests.recipes import (
    final_tensors,
    losses,
    recipe_class,
    run_well,
    save_small_bert,
    save_small_convnext,
    save_small_gpt,
    save_small_t5,
)
from tests.sound_models import save_small_ast, save_small_wav2vec2

STEPS, STOP = 4, 2
NUM_TRAIN, NUM_EVAL = 40, 10  # samples that are left of the recipe's data
SMALL_TRANSLATION = ("--num-beams", "2", "--max-target-length", "24", "--width", "32", "--layers", "1")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe, options for a few steps, and a reader of its checkpoint in another library.

    `words` may hold {folder}, which `prepare` has filled.
    """

    recipe: str
    words: tuple[str, ...] = ()
    name: str = ""
    bound: float = 1e-6
    prepare: Callable[[Path], None] = lambda folder: None
    auto_class: str = ""
    preset: str = "demo"
    ranks: int = 2
    """Of the second half of a run that begins on two."""

    def __str__(self) -> str:
        return self.name or self.recipe


def save_features(folder: Path) -> None:
    """Write weights of a narrow VGG-16 under torchvision's names."""
    from safetensors.torch import save_file

    from shardlaunch.recipes.vgg16_transfer import Vgg16

    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = Vgg16(10, width=0.05, batch_norm=True).state_dict()
    save_file(weights, folder / "model.safetensors")


def save_chats(folder: Path) -> None:
    """Write conversations about films, of which there are many."""
    folder.mkdir()
    talks = film_chats()["eval"].select(range(NUM_TRAIN + NUM_EVAL + 20))
    talks.to_json(folder / "talks.jsonl")


CASES = (
    Case(recipe="mnist_mlp"),
    Case(recipe="cifar_cnn", name="textbook convolutional net"),
    Case(
        recipe="cifar_cnn",
        name="residual net",
        words=("--net", "modern", "--width", "4", "--flip", "--shift", "2", "--lr", "0.05"),
        bound=1e-5,
    ),
    Case(
        recipe="vgg16_transfer",
        words=(
            *("--width", "0.05", "--weights", "{folder}", "--freeze", "features.*", "--unfreeze-at-step", "3"),
            *("--lr-factors", "features.*=0.1"),
        ),
        prepare=save_features,
        bound=1e-5,
    ),
    Case(
        recipe="image_classifier",
        words=("--architecture", "vit", "--layers", "1", "--width", "24", "--patch-size", "8", "--dropout", "0.1"),
        auto_class="AutoModelForImageClassification",
    ),
    Case(
        recipe="image_classifier",
        name="pretrained convnext",
        words=("--model", "{folder}", "--image-size", "16"),
        prepare=save_small_convnext,
        auto_class="AutoModelForImageClassification",
    ),
    Case(recipe="audio_classifier", words=("--width", "4", "--dropout", "0.1"), ranks=3),
    Case(
        recipe="audio_classifier",
        name="audio spectrogram transformer",
        words=("--model", "{folder}"),
        prepare=save_small_ast,
        auto_class="AutoModelForAudioClassification",
    ),
    Case(
        recipe="audio_classifier",
        name="wav2vec2",
        words=("--model", "{folder}", "--seconds", "0.6"),
        prepare=save_small_wav2vec2,
        ranks=3,
        auto_class="AutoModelForAudioClassification",
    ),
    Case(
        recipe="bert_imdb",
        words=("--model", "{folder}", "--max-length", "32"),
        prepare=save_small_bert,
        auto_class="AutoModelForSequenceClassification",
    ),
    Case(
        recipe="bert_qa",
        words=("--model", "{folder}", "--max-length", "32", "--stride", "8"),
        prepare=save_small_bert,
        auto_class="AutoModelForQuestionAnswering",
    ),
    Case(
        recipe="gpt_lm",
        words=("--vocab-size", "300", "--context-length", "32", "--layers", "2", "--width", "32"),
        auto_class="AutoModelForCausalLM",
    ),
    Case(
        recipe="gpt_lm",
        name="chats",
        words=("--data", "{folder}", "--vocab-size", "300", "--layers", "2", "--width", "32"),
        preset="chat",
        prepare=save_chats,
        ranks=3,
        auto_class="AutoModelForCausalLM",
    ),
    Case(
        recipe="dpo_lm",
        words=("--model", "{folder}", "--lr", "1e-2"),
        prepare=save_small_gpt,
        ranks=3,
        auto_class="AutoModelForCausalLM",
    ),
    Case(
        recipe="bert_tagger",
        words=("--model", "{folder}", "--max-length", "24"),
        prepare=save_small_bert,
        ranks=3,
        auto_class="AutoModelForTokenClassification",
    ),
    Case(
        recipe="bert_imdb",
        name="several labels",
        words=("--model", "{folder}", "--max-length", "32", "--task", "multi-label"),
        prepare=save_small_bert,
        ranks=3,
        auto_class="AutoModelForSequenceClassification",
    ),
    Case(
        recipe="embed_pairs",
        words=("--model", "{folder}", "--max-length", "32", "--lr", "1e-3"),
        prepare=save_small_bert,
        ranks=3,
        auto_class="AutoModel",
    ),
    Case(
        recipe="bert_mlm",
        words=("--model", "{folder}", "--max-length", "24", "--lr", "1e-3", "--whole-words"),
        prepare=save_small_bert,
        ranks=3,
        auto_class="AutoModelForMaskedLM",
    ),
    Case(recipe="translate_seq2seq", words=SMALL_TRANSLATION, auto_class="AutoModelForSeq2SeqLM"),
    Case(
        recipe="translate_seq2seq",
        name="summarize_t5",
        words=("--model", "{folder}", *SMALL_TRANSLATION[:4], "--metrics", "rouge1", "rouge2", "rougeL"),
        prepare=save_small_t5,
        auto_class="AutoModelForSeq2SeqLM",
    ),
)


def few(recipe_type: type[Recipe]) -> type[Recipe]:
    """Return the recipe on a few samples of its data."""

    class Few(recipe_type):  # type: ignore[misc,valid-type]
        def datasets(self) -> Mapping[str, Any]:
            splits = dict(super().datasets())
            for name, most in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
                rows = torch.arange(min(most, len(splits[name]))).numpy()
                splits[name] = splits[name].select(rows)
            return splits

    return Few


def _run(recipe: str, argv: list[str]) -> str:
    """Run a recipe on a few samples, without a hub. On each rank."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    return run_well(few(recipe_class(recipe)), argv)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recipe(case: Case, tmp_path: Path) -> None:
    case.prepare(tmp_path / "folder")
    argv = [word.format(folder=tmp_path / "folder") for word in case.words]
    argv = [
        *("--preset", case.preset, "--max-steps", str(STEPS), "--global-batch-size", "16", "--micro-batch-size", "4"),
        *("--tracker", "none", "--eval-every", str(STEPS), "--save-every", "0", "--threads-per-rank", "1"),
        *argv,
    ]
    one, two, resumed = (str(tmp_path / name) for name in ("one", "two", "resumed"))
    run_on_ranks(1, _run, case.recipe, [*argv, "--output-dir", one])
    run_on_ranks(2, _run, case.recipe, [*argv, "--output-dir", two, "--stop-at-step", str(STOP)])
    run_on_ranks(case.ranks, _run, case.recipe, [*argv, "--output-dir", two, "--strategy", "fsdp2"])
    run_on_ranks(1, _run, case.recipe, [*argv, "--output-dir", resumed, "--stop-at-step", str(STOP)])
    run_on_ranks(1, _run, case.recipe, [*argv, "--output-dir", resumed])

    expected, found = losses(Path(one)), losses(Path(two))
    assert len(expected) == STEPS
    assert max(abs(expected[step] - found[step]) for step in expected) <= case.bound
    assert losses(Path(resumed)) == expected
    tensors, others = final_tensors(Path(one)), final_tensors(Path(resumed))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    for output_dir in (one, two):
        _assert_others_can_read(Path(output_dir) / "checkpoints" / step_dir_name(STEPS), case.auto_class)


def _assert_others_can_read(step_dir: Path, auto_class: str) -> None:
    weights = {}
    for file in step_dir.glob("model-*.safetensors"):
        with safe_open(file, "pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    assert weights
    if auto_class:
        import transformers

        model = getattr(transformers, auto_class).from_pretrained(step_dir)
        (architecture,) = json.loads((step_dir / "config.json").read_text())["architectures"]
        by_name, loading = getattr(transformers, architecture).from_pretrained(step_dir, output_loading_info=True)
        assert type(by_name) is type(model)
        assert not any(loading.values()), loading
        assert all(torch.equal(weights[name], value) for name, value in model.named_parameters() if name in weights)
        assert weights.keys() <= model.state_dict().keys()


def test_tensor_data_is_cut_by_rows() -> None:
    data = TensorData(inputs=torch.arange(6).reshape(3, 2), labels=torch.arange(3))
    assert data.select(torch.tensor([2, 0]).numpy()).columns["inputs"].tolist() == [[4, 5], [0, 1]]
