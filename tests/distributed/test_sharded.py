"""Sharded strategies beyond the plain run: other precisions, unusual models, and unsupported ones."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardlaunch import Recipe
from shardlaunch.sharding import lockstep
from tests.distributed.ranks import run_on_ranks
from tests.recipes import (
    FewReviews,
    MaskedBert,
    NetRecipe,
    final_tensors,
    losses,
    run_quietly,
    run_well,
    save_small_bert,
    training_lines,
)

STEPS = ["--max-steps", "8", "--threads-per-rank", "1", "--lr", "0.003"]


def _run(num_ranks: int, recipe_type: type[Recipe], output_dir: Path, *options: str) -> Path:
    run_on_ranks(num_ranks, run_well, recipe_type, [*STEPS, *options, "--output-dir", str(output_dir)])
    return output_dir


def _loss_difference(one: Path, other: Path) -> float:
    expected, found = losses(one), losses(other)
    assert expected.keys() == found.keys()
    return max(abs(expected[step] - found[step]) for step in expected)


def _refusal(recipe_type: type[Recipe], argv: list[str], *, num_ranks: int = 2) -> str:
    """Return the output of all ranks of a refused run; only one of them prints the error."""
    answers = run_on_ranks(num_ranks, run_quietly, recipe_type, argv)
    assert [status for status, _ in answers] == [2] * num_ranks, answers
    return "".join(output for _, output in answers)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--no-reshard-after-forward",),
        ("--cpu-offload",),
        ("--optimizer", "sgd", "--momentum", "0.9"),
        ("--precision", "bf16"),
        ("--precision", "fp16"),
        ("--layer-classes", "Linear", "BatchNorm1d"),
    ],
    ids=str,
)
def test_fsdp2_runs_a_net_with_batch_norm_and_a_parameter_that_data_decides_upon(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    run_options = options if "precision" in str(options) or "momentum" in str(options) else ()
    one = _run(1, NetRecipe, tmp_path / "one", *run_options)
    two = _run(2, NetRecipe, tmp_path / "two", "--strategy", "fsdp2", *options)
    assert _loss_difference(one, two) <= 1e-6
    tensors, others = final_tensors(one), final_tensors(two)
    assert tensors.keys() == others.keys()
    for key in tensors:
        torch.testing.assert_close(others[key], tensors[key], atol=5e-5, rtol=0, msg=key)


def test_bf16_differs_under_fsdp2_no_more_than_under_ddp(tmp_path: Path) -> None:
    """Sums are rounded to bf16 in both; a norm or embedding gathered in bf16 would differ 20 times as much."""
    one = _run(1, MaskedBert, tmp_path / "one", "--precision", "bf16")
    fp32 = _run(1, MaskedBert, tmp_path / "fp32")
    ddp = _run(2, MaskedBert, tmp_path / "ddp", "--precision", "bf16")
    fsdp2 = _run(2, MaskedBert, tmp_path / "fsdp2", "--precision", "bf16", "--strategy", "fsdp2")
    assert _loss_difference(one, fp32) > 5e-5, "bf16 is in effect"
    assert _loss_difference(one, fsdp2) <= 2 * _loss_difference(one, ddp) + 1e-5
    tensors = final_tensors(fsdp2)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    weight = tensors["bert.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(weight.bfloat16().float(), weight), "a checkpoint holds the weights before any rounding"


def test_pretrained_weights_reach_every_shard(tmp_path: Path) -> None:
    save_small_bert(tmp_path / "model")
    options = ("--preset", "demo", "--model", str(tmp_path / "model"), "--max-length", "16", "--tracker", "none")
    one = _run(1, FewReviews, tmp_path / "one", *options)
    three = _run(3, FewReviews, tmp_path / "three", "--strategy", "fsdp2", *options)
    assert _loss_difference(one, three) <= 1e-6
    evaluations = [[line for line in training_lines(folder) if "eval/loss" in line] for folder in (one, three)]
    assert evaluations[0][0]["eval/accuracy"] == evaluations[1][0]["eval/accuracy"]


class PeekingNet(NetRecipe):
    """A net whose constructor reads a value of a parameter, and computes a buffer from another."""

    def model(self) -> nn.Module:
        model = super().model()
        model.scale = nn.Parameter(torch.tensor(1.0 + model.middle.weight.abs().max().item()))
        model.register_buffer("start", model.first.weight.detach().sum())
        model.register_forward_hook(lambda module, _, output: output * module.scale + module.start)
        return model


def test_a_constructor_that_needs_values_has_them_and_is_named(tmp_path: Path) -> None:
    one = _run(1, PeekingNet, tmp_path / "one")
    argv = [*STEPS, "--strategy", "fsdp2", "--output-dir", str(tmp_path / "two")]
    for stop in (["--stop-at-step", "2"], []):
        answers = run_on_ranks(2, run_quietly, PeekingNet, [*argv, *stop])
        assert answers[0][0] == 0, answers[0][1]
        said = " ".join(answers[0][1].split())
        assert "each process held the whole model while this run started: the constructor needs values of" in said
    assert _loss_difference(one, tmp_path / "two") <= 1e-6
    assert final_tensors(one)["start"] == final_tensors(tmp_path / "two")["start"]


class DroppedBert(MaskedBert):
    """The masked model that skips blocks at random, different ones per micro-batch."""

    def model(self) -> nn.Module:
        model = super().model()
        layers = model.bert.encoder.layer
        for number, layer in enumerate(layers):
            layers[number] = Skipping(layer)
        return model


class LayerDroppingBart(MaskedBert):
    """A model whose configuration says that it skips layers."""

    def model(self) -> nn.Module:
        from transformers import BartConfig, BartForConditionalGeneration

        sizes = {"vocab_size": 101, "d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartForConditionalGeneration(
            BartConfig(**sizes, encoder_layers=1, decoder_layers=1, decoder_layerdrop=0.1)
        )


class Skipping(nn.Module):
    """A block that is sometimes skipped."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden if torch.rand(()) < 0.5 else self.layer(hidden, *args, **kwargs)


class RandomFeatures(NetRecipe):
    """A net whose constructor draws a non-persistent buffer, after its parameters."""

    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("features", torch.rand(3), persistent=False)
        return model


class SubmoduleNet(NetRecipe):
    """A recipe whose forward() bypasses the model."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model.last(model.tied(model.middle(model.norm(model.first(batch["inputs"])))))


class EmptyParameterNet(NetRecipe):
    """A net with a parameter without elements."""

    def model(self) -> nn.Module:
        model = super().model()
        model.nothing = nn.Parameter(torch.ones(0, 3))
        return model


class Factored(NetRecipe):
    """A net trained by an optimizer that needs full weight matrices."""

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor([parameter for _, parameter in parameters], lr=self.options.lr)


class CountingInEvaluation(NetRecipe):
    """A net that counts its forward passes, including those of an evaluation."""

    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("passes", torch.zeros(()))
        model.register_forward_pre_hook(_count)
        return model


def _count(model: nn.Module, _: object) -> None:
    model.passes.add_(1)


class ScaledBlocks(MaskedBert):
    """The masked model with a scale that belongs to each block, a table of sums, and a norm over two dimensions."""

    def model(self) -> nn.Module:
        model = super().model()
        for layer in model.bert.encoder.layer:
            layer.scale = nn.Parameter(torch.rand(20))
            layer.square = nn.LayerNorm((2, 10))
            layer.register_forward_hook(_scale)
        return model


def _scale(layer: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
    return layer.square((output.float() * layer.scale).unflatten(-1, (2, 10))).flatten(-2)


def test_what_autocast_leaves_alone_is_left_alone_in_shards(tmp_path: Path) -> None:
    one = _run(1, ScaledBlocks, tmp_path / "one", "--precision", "bf16")
    two = _run(2, ScaledBlocks, tmp_path / "two", "--precision", "bf16", "--strategy", "fsdp2")
    assert _loss_difference(one, two) <= 1e-4


def test_an_evaluation_leaves_no_trace_in_buffers(tmp_path: Path) -> None:
    one = _run(1, CountingInEvaluation, tmp_path / "one", "--eval-every", "2")
    two = _run(2, CountingInEvaluation, tmp_path / "two", "--eval-every", "2", "--strategy", "fsdp2")
    assert final_tensors(one)["passes"] == final_tensors(two)["passes"] == 8


def test_a_random_buffer_is_noticed_at_a_resume_too(tmp_path: Path) -> None:
    _run(1, RandomFeatures, tmp_path, "--stop-at-step", "2")
    argv = [*STEPS, "--strategy", "fsdp2", "--output-dir", str(tmp_path)]
    assert "non-persistent buffers differ from the checkpoint's" in _refusal(RandomFeatures, argv)


class NarrowBert(MaskedBert):
    """The masked model as it is."""


class WiderBert(MaskedBert):
    """The masked model with more tokens, and one tensor under another name."""

    def model(self) -> nn.Module:
        self.vocab_size = 103
        model = super().model()
        model.always = model.never
        del model.never
        return model


class ShampooLike(torch.optim.SGD):
    """An unknown optimizer."""


class OddlyOptimized(NetRecipe):
    """A net trained by an unknown optimizer."""

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return ShampooLike([parameter for _, parameter in parameters], lr=self.options.lr)


REFUSED: list[tuple[type[Recipe], tuple[str, ...], tuple[str, ...]]] = [
    (NetRecipe, ("--strategy", "fsdp2", "--layer-classes", "Nope"), ("--layer-classes Nope", "Linear")),
    (NetRecipe, ("--strategy", "ddp", "--cpu-offload"), ("ddp does not shard",)),
    (LayerDroppingBart, ("--strategy", "fsdp2"), ("decoder_layerdrop=0.1", "Set this to 0")),
    (LayerDroppingBart, ("--strategy", "zero3"), ("decoder_layerdrop=0.1", "zero1 or zero2")),
    (OddlyOptimized, ("--strategy", "zero2"), ("ShampooLike", "AdamW", "--strategy ddp or fsdp2")),
    (EmptyParameterNet, ("--strategy", "fsdp2"), ("without elements", "nothing")),
    (EmptyParameterNet, ("--strategy", "zero3"), ("without elements", "ddp")),
    (RandomFeatures, ("--strategy", "fsdp2"), ("draws them at random: features", "persistent=True")),
    (Factored, ("--strategy", "fsdp2"), ("Adafactor needs full weight matrices",)),
    (SubmoduleNet, ("--strategy", "fsdp2"), ("must call the model itself",)),
    (NetRecipe, ("--strategy", "fsdp2", "--shard-ranks", "2"), ("use --strategy hsdp",)),
]


@pytest.mark.parametrize(("recipe_type", "options", "said"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_before_any_work(
    recipe_type: type[Recipe], options: tuple[str, ...], said: tuple[str, ...], tmp_path: Path
) -> None:
    argv = [*STEPS, *options, "--output-dir", str(tmp_path)]
    output = _refusal(recipe_type, argv)
    assert "Traceback" not in output
    assert all(text in output for text in said), output
    assert not (tmp_path / "metrics.jsonl").exists()


def test_replicas_that_the_ranks_do_not_make_up_are_refused(tmp_path: Path) -> None:
    argv = [*STEPS, "--strategy", "hsdp", "--shard-ranks", "3", "--output-dir", str(tmp_path)]
    said = _refusal(NetRecipe, argv, num_ranks=4)
    assert "4 ranks cannot be divided into several replicas of 3 shards each. Give --shard-ranks 2, or use" in said


def _run_with_little_patience(recipe_type: type[Recipe], argv: list[str]) -> tuple[int, str]:
    lockstep.PATIENCE = timedelta(seconds=5)
    return run_quietly(recipe_type, argv)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_ranks_that_run_other_modules_are_noticed(strategy: str, tmp_path: Path) -> None:
    argv = [*STEPS, "--output-dir", str(tmp_path), "--strategy", strategy]
    answers = run_on_ranks(2, _run_with_little_patience, DroppedBert, argv)
    assert all(status for status, _ in answers), answers
    said = "".join(output for _, output in answers)
    assert "the ranks do not run the same modules in the same order" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 8


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_checkpoint_of_another_model_is_refused_by_names(strategy: str, tmp_path: Path) -> None:
    _run(1, NarrowBert, tmp_path, "--max-steps", "4", "--stop-at-step", "2")
    argv = [*STEPS, "--max-steps", "4", "--strategy", strategy, "--output-dir", str(tmp_path)]
    output = _refusal(WiderBert, argv)
    assert "1 missing: always" in output
    assert "1 unexpected: never" in output
    assert "bert.embeddings.word_embeddings.weight (saved [101, 20], here [103, 20])" in output
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002"]
