"""Options from defaults, preset, YAML file and command line."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from shardlaunch import Options, UserError, option
from shardlaunch.launcher.options import marks, parse_options


@dataclass(kw_only=True)
class _Options(Options):
    depth: int = 3
    """Layers."""
    place: str = option("here", mark="free")
    """Where."""


PRESETS = {
    "small": {"depth": 1, "lr": 0.5},
    "nesterov": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "betas": (0.8, 0.9)},
}


def _parse(*argv: str) -> _Options:
    return parse_options(_Options, PRESETS, argv, program="x.py", description="X.", show=False)


def test_the_later_source_wins(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    # YAML 1.1 reads 1e-4 as text; the option's own type decides.
    config.write_text("lr: 1e-4\ncompile: true\nsave-every: 7\nglobal_batch_size: 64\npreset: small\n")
    options = _parse("--config", str(config), "--save-every", "9")
    assert (options.lr, options.compile, options.save_every, options.depth) == (1e-4, True, 9, 1)
    assert options.global_batch_size == 64
    assert _parse("--preset=small", "--depth", "5").depth == 5
    assert _parse("--preset=small").lr == 0.5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("depht: 1", "unknown option 'depht'"),
        ("depth: [1]", "single value"),
        ("compile: 3", "cannot be 3"),
        ("lr: true", "cannot be True"),
        ("- 1", "mapping"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_bad_config_files(text: str, complaint: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=complaint):
        _parse("--config", str(config))


def test_an_option_is_identity_unless_it_says_otherwise() -> None:
    found = marks(_parse())
    assert found["depth"] == found["lr"] == "identity"
    assert found["place"] == found["strategy"] == "free"
    assert found["compile"] == "warn"


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
