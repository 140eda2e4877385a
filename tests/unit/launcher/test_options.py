"""Options from defaults, preset, YAML file, command line and keyword arguments."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from shardlaunch import Options, UserError, option
from shardlaunch.launcher.command_line.parsing import options_from_keywords, parse_options
from shardlaunch.launcher.option_fields import option_types
from shardlaunch.launcher.options import marks
from shardlaunch.sharding.precision import PRECISIONS
from shardlaunch.sharding.resolve import STRATEGIES


@dataclass(kw_only=True)
class _Options(Options):
    depth: int = 3
    """Layers."""
    place: str = option("here", mark="free")
    """Where."""
    widths: tuple[int, ...] = option((4, 4), minimum=1)
    share: float | None = option(None, minimum=0, below=1)
    lr: float = 0.25
    keep: int = 7
    schedule: str = "linear"


PRESETS = {
    "small": {"depth": 1, "lr": 0.5},
    "nesterov": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "betas": (0.8, 0.9)},
    "wrong": {"depht": 1},
}


def _parse(*argv: str) -> _Options:
    return parse_options(_Options, PRESETS, argv, program="x.py", description="X.", show=False)


def test_the_later_source_wins(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    # YAML 1.1 reads 1e-4 as text; the option's own type decides.
    config.write_text("lr: 1e-4\ncompile: true\nsave-every: 7\nglobal_batch_size: 64\npreset: small\nwidths: [1, 2]\n")
    options = _parse("--config", str(config), "--save-every", "9")
    assert (options.lr, options.compile, options.save_every, options.depth) == (1e-4, True, 9, 1)
    assert (options.global_batch_size, options.widths) == (64, (1, 2))
    assert _parse("--preset=small", "--depth", "5").depth == 5
    assert _parse("--preset=small").lr == 0.5
    assert _parse("--depth", "5", "--depth=6").depth == 6


def test_words_are_read_the_same_in_every_spelling() -> None:
    for words in (("--global-batch-size", "64"), ("--global_batch_size=64",), ("--global-batch_size", "64")):
        assert _parse(*words).global_batch_size == 64
    assert _parse("--widths", "1", "2", "--share=0.5").widths == (1, 2)
    assert _parse("--widths").widths == ()
    assert _parse("--widths=3").widths == (3,)
    assert _parse("--share", "None").share is None
    assert not _parse("--no-reshard-after-forward").reshard_after_forward
    assert _parse("--no_compile", "--compile").compile
    assert _parse("--optimizer-args", "a=-1", "b=2").optimizer_args == ("a=-1", "b=2")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--lr", "fast"), "--lr fast: must be a number"),
        (("--epochs", "1.5"), "--epochs 1.5: must be a whole number"),
        (("--save-every", "often"), "--save-every often: must be a whole number, or auto"),
        (("--save-every", "-1"), "--save-every -1: must be at least 0"),
        (("--mtbf", "10"), "--mtbf 10: write a time with its units"),
        (("--epochs",), "--epochs: its value is missing; it must be a whole number"),
        (("--epochs", "1", "-lr", "2"), "--epochs: takes one value, not 3: 1 -lr 2"),
        (("--betas", "0.9"), "--betas 0.9: must be 2 numbers"),
        (("--compile", "yes"), "--compile yes: takes no value; turn it off with --no-compile"),
        (("epochs", "3"), "epochs: not an option; options begin with two hyphens"),
        (("--strategy", "magic"), "--strategy magic: must be one of auto, single, dp, ddp"),
        (("--schedule", "sine"), "--schedule sine: must be one of constant, linear"),
        (("--depht", "1"), r"--depht: unknown option; did you mean --depth\?"),
        (("--no-lr",), "--no-lr: unknown option"),
        (("--xyz", "1"), "--xyz: unknown option; --help lists all"),
        (("--preset", "big"), "--preset big: unknown; choose one of small, nesterov"),
        (("--preset", "wrong"), r"--preset wrong: depht: unknown option; did you mean --depth\?"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_words(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=f"^{complaint}"):
        _parse(*words)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("depht: 1", r"depht: unknown option; did you mean --depth\?"),
        ("learning-rate: 1", r"learning-rate: did you mean --lr\?"),
        ("depth: [1]", "single value"),
        ("widths: 3", "a list of values"),
        ("widths: [3, a]", "--widths 3 a: must be whole numbers"),
        ("depth: deep", r"run.yaml: --depth deep: must be a whole number"),
        ("compile: 3", "cannot be 3"),
        ("lr: true", "cannot be True"),
        ("config: other.yaml", "remove 'config'"),
        ("- 1", "mapping"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_bad_config_files(text: str, complaint: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=complaint):
        _parse("--config", str(config))


def test_keyword_arguments_are_options_too(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("depth: 2\nlr: 0.125\n")
    given: dict[str, Any] = {"preset": "small", "config": str(config), "lr": 1, "widths": [8], "output_dir": tmp_path}
    options = options_from_keywords(_Options, PRESETS, given)
    assert (options.depth, options.lr, options.widths, options.output_dir) == (2, 1.0, (8,), str(tmp_path))
    assert isinstance(options.lr, float)
    assert options.explicitly_set == {*given, "depth"}
    again = options_from_keywords(_Options, PRESETS, {"seed": 3}, base=options)
    assert (again.seed, again.depth, again.explicitly_set) == (3, 2, {*given, "depth", "seed"})
    with pytest.raises(UserError, match="preset and config need a recipe class"):
        options_from_keywords(_Options, PRESETS, {"preset": "small"}, base=options)
    with pytest.raises(UserError, match=r"^learning_rate: did you mean --lr\?"):
        options_from_keywords(_Options, PRESETS, {"learning_rate": 1})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"strategy": "magic"}, "--strategy magic: must be one of auto, single"),
        ({"schedule": "sine"}, "--schedule sine: must be one of constant, linear"),
        ({"lr": "0.1"}, "--lr 0.1: must be a number"),
        ({"lr": 0}, "--lr 0.0: must be above 0"),
        ({"lr": float("nan")}, "--lr nan: must be above 0"),
        ({"epochs": True}, "--epochs True: must be a whole number"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"epochs": None}, "--epochs None: must be a whole number"),
        ({"compile": 1}, "--compile 1: must be True or False"),
        ({"warmup_ratio": 1}, "--warmup-ratio 1.0: must be at least 0 and below 1"),
        ({"final_lr_ratio": 1.5, "schedule": "linear"}, "--final-lr-ratio 1.5: must be at least 0 and at most 1"),
        ({"widths": (1, 0)}, "--widths 1 0: each value must be at least 1"),
        ({"widths": 1}, "--widths 1: must be whole numbers"),
        ({"betas": (0.9,)}, "--betas 0.9: must be 2 numbers"),
        ({"share": 1.0}, "--share 1.0: must be at least 0 and below 1"),
        ({"folds": 1}, "--folds 1: must be at least 2"),
        ({"global_batch_size": 12}, "--global-batch-size 12 is not a multiple of --micro-batch-size 8"),
    ],
    ids=str,
)
def test_values_are_checked_wherever_they_come_from(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"^{complaint}"):
        _Options(**given)


def test_there_is_a_choice_for_every_strategy_and_precision() -> None:
    types = option_types(Options)
    assert get_args(types["strategy"]) == ("auto", *STRATEGIES)
    assert get_args(types["precision"]) == ("auto", *PRECISIONS)


def test_an_option_is_identity_unless_it_says_otherwise() -> None:
    found = marks(_parse())
    assert found["depth"] == found["lr"] == "identity"
    assert found["place"] == found["strategy"] == "free"
    assert found["compile"] == "warn"
    assert found["keep"] == "free"  # declared again without a word on it


def test_another_optimizer_is_not_given_what_the_preset_sets_for_its_own() -> None:
    options = _parse("--preset", "nesterov", "--optimizer", "adam")
    assert (options.momentum, options.nesterov, options.betas) == (None, False, (0.8, 0.9))
    assert _parse("--preset", "nesterov").momentum == 0.9
    for momentum in (0.5, 0.9):  # given by hand, to be refused, also where it is what the preset sets
        words = ("--preset", "nesterov", "--optimizer", "adam", "--momentum", str(momentum))
        assert _parse(*words).momentum == momentum


def test_options_know_which_were_given(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("save-every: 7\n")
    words = ("--config", str(config), "--depth", "3", "--place=there", "--no-reshard-after-forward")
    assert _parse(*words).explicitly_set == {"config", "save_every", "depth", "place", "reshard_after_forward"}
    assert _parse().explicitly_set == frozenset()


@pytest.mark.parametrize("name", ["a/b", "..", ".", "/a", "a/"])
def test_a_run_name_is_no_path(name: str) -> None:
    with pytest.raises(UserError, match=f"^--run-name {name}: must be a plain name"):
        Options(run_name=name)


def test_a_word_in_place_of_a_number_is_inherited() -> None:
    @dataclass(kw_only=True)
    class Mine(Options):
        save_every: int = option(7, mark="free")

    def parsed(*words: str) -> object:
        return parse_options(Mine, {}, list(words), program="mine.py", description="", show=False).save_every

    assert parsed() == 7
    assert parsed("--save-every", "9") == 9
    assert parsed("--save-every", "auto") == "auto"
