"""Options files: YAML 1.2, values by the option's own type, and messages that name file, line and option."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from shardlaunch import Options, Recipe, UserError, fit, option
from shardlaunch.launcher.command_line.parsing import options_from_keywords, parse_options
from shardlaunch.launcher.option_fields import is_path
from shardlaunch.launcher.recipe import options_type_of
from tests.recipes import NetOptions, NetRecipe, recipe_class


@dataclass(kw_only=True)
class _Options(Options):
    words: tuple[str, ...] = ()
    sizes: list[int] = field(default_factory=lambda: [8])
    where: Path | None = None
    share: float | None = option(None, minimum=0)
    threshold: float = math.nan
    ceiling: float = option(math.inf, minimum=0, maximum=math.inf)
    level: Literal["no", "010", "1e-3"] = "no"


def _read(text: str | bytes, folder: Path, *words: str, preset: dict[str, Any] | None = None) -> _Options:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    presets = {"p": preset} if preset is not None else {}
    return parse_options(
        _Options, presets, ("--config", str(path), *words), program="x.py", description="X.", show=False
    )


@pytest.mark.parametrize(
    "text",
    ["2024_11_25", "010", "01", "no", "1e-3", "2024-11-25", "12:30:45", "0x1F", "0o17", "1_000", ".5", "+1", "-bert.*"],
)
def test_a_text_option_takes_the_text_as_it_is_written(text: str, tmp_path: Path) -> None:
    options = _read(f"run_name: {text}\nwords: [{text}, '{text}']\nlayer_classes:\n- {text}\n", tmp_path)
    assert (options.run_name, options.words, options.layer_classes) == (text, (text, text), (text,))


def test_each_option_makes_of_a_text_what_the_command_line_makes(tmp_path: Path) -> None:
    text = "lr: 1e-3\nseed: 010\nlevel: 1e-3\nsizes: [01, 2]\ncompile: yes\nreshard_after_forward: off\nshare: +.5\n"
    options = _read(f"# a comment\n{text}threshold: -.INF\nceiling: .inf\nwords: [null, true, ~, '']\n", tmp_path)
    assert (options.lr, options.seed, options.level, options.sizes, options.share) == (1e-3, 10, "1e-3", [1, 2], 0.5)
    assert (options.compile, options.reshard_after_forward) == (True, False)
    assert (options.threshold, options.ceiling) == (-math.inf, math.inf)
    assert options.words == ("null", "true", "~", "")


def test_several_files_of_data_are_the_same_on_every_way(tmp_path: Path) -> None:
    paths = ["a.csv", "my data/b.csv"]
    by_file = _read(f"data: [{paths[0]}, {paths[1]}]", tmp_path)
    by_words = _read("", tmp_path, "--data", *paths)
    by_keyword = options_from_keywords(_Options, {}, {"data": paths})
    assert by_file.data == by_words.data == by_keyword.data == "a.csv 'my data/b.csv'"
    with pytest.raises(UserError, match="takes a single value"):
        _read("data: {a: b}", tmp_path)


def test_null_stands_for_the_default_and_none_where_an_option_may_be_none(tmp_path: Path) -> None:
    preset = {"share": 0.25, "seed": 7}
    options = _read("preset: p\nshare: null\nseed: null\nrun_name: Null\n", tmp_path, preset=preset)
    assert (options.share, options.seed, options.run_name) == (None, 7, "")
    assert _read('run_name: "null"\n', tmp_path).run_name == "null"


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "---\n", "\ufefflr: 0.5\n", "lr: 0.5\n...\n", "{lr: 0.5}", "a: &x 1\n".replace("a", "epochs")],
)
def test_forms_of_files(text: str, tmp_path: Path) -> None:
    assert _read(text, tmp_path).lr == (0.5 if "lr" in text else 0.001)


def test_anchors_and_utf_16(tmp_path: Path) -> None:
    options = _read("words: &w [a, b]\nlayer_classes: *w\n", tmp_path)
    assert options.layer_classes == ("a", "b")
    assert _read("run_name: é\n".encode("utf-16"), tmp_path).run_name == "é"


BOMB = "words: &a [x]\n" + "".join(f"w{i}: &a [{', '.join(['*a'] * 9)}]\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lr: 1\nseed: 1\nlr: 2\n", "lr: is set in line 1 and in line 3"),
        ("save-every: 1\nsave_every: 2\n", "save_every: is set in line 1 and in line 2"),
        ("seed: 1\nlr: .inf\n", r"--lr inf: must be a finite number \(line 2\)"),
        ("lr: .nan\n", r"--lr nan: must be above 0 \(line 1\)"),
        ("lr: 0\n", r"--lr 0.0: must be above 0 \(line 1\)"),
        ("betas: [.inf, 0]\n", "each value must be at least 0 and at most 1"),
        ("eps: .inf\n", "--eps inf: must be a finite number"),
        ("lr:\n", "'lr' has no value"),
        ("words: [a, ]\nlr: ''\n", "--lr : must be a number"),
        ("words:\n- a\n-\n", "'words' has no value"),
        ("words: [[a]]\n", r"'words' takes a list of values, not of lists or mappings \(line 1\)"),
        ("words: [{a: b}]\n", "not of lists or mappings"),
        ("words: {a: b}\n", r"'words' takes a single value or a list, not a mapping \(line 1\)"),
        ("seed: 1\n\nsizes: [1, x]\n", r"--sizes 1 x: must be whole numbers \(line 3\)"),
        ("compile: 'true'\n", "'compile' cannot be true"),
        ("compile: 1\n", "'compile' cannot be 1"),
        ("seed: yes\n", "'seed' cannot be yes"),
        ("output_dir: ~\n", "a bare ~ means nothing in YAML"),
        (
            "seed: !!python/object:os.system 3\n",
            r"'seed' cannot have the tag .*python/object:os.system; remove it \(line 1\)",
        ),
        ("seed: !mine 3\n", r"'seed' cannot have the tag !mine; remove it \(line 1\)"),
        ("training:\n  lr: 1\n", r"training: unknown option.* \(line 1\)"),
        ("<<: {lr: 1}\n", r"<<: unknown option.* \(line 1\)"),
        ("optimizer:\n  lr: 1\n", r"'optimizer' takes a single value or a list, not a mapping \(line 1\)"),
        ("[lr]: 1\n", "line 1: an option's name must be a word"),
        ("? {a: b}\n: 1\n", "line 1: an option's name must be a word"),
        (": 1\n", "line 1: an option's name must be a word"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: expected a single document .*line 2"),
        ("lr: 1\n\tseed: 2\n", r"not valid YAML: .*line 2"),
        ("lr: *nosuch\n", "not valid YAML: found undefined alias"),
        ("seed: \x07\n", "not valid YAML: .*#x0007"),
        (b"run_name: caf\xe9\n", "not valid YAML: .*#x00e9"),
        ("words: " + "[" * 5000, "not valid YAML: it is nested too deeply"),
        (BOMB, "w0: unknown option"),
        (
            BOMB.replace("w0", "freeze").partition("w1")[0],
            "'freeze' takes a list of values, not of lists",
        ),
        ("#" * 300_000, "at most 262,144 are read"),
        ("run_name: 'a\\b'\nwords: \"\\e[31m\"\n", r"'words' takes a list of values, not .*x1b\[31m"),
        ('run_name: "a\\nb"\n', r"--run-name a.nb: must have no control characters"),
        ("lr\n", "must be a mapping"),
        ("null\n", "must be a mapping"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_a_file_cannot_say(text: str | bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        _read(text, tmp_path)
    assert "run.yaml" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    (tmp_path / "dir.yaml").mkdir()
    for name, complaint in {
        "pipe.yaml": "is a pipe",
        "endless.yaml": "is a device",
        "dir.yaml": "is a folder",
        "none.yaml": "No such file",
    }.items():
        with pytest.raises(UserError, match=f"^--config .*{name}: .*{complaint}"):
            options_from_keywords(_Options, {}, {"config": tmp_path / name})


def test_what_comes_out_later_names_the_line_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--micro-batch-size 8.*\(--global-batch-size: line 2 of .*run.yaml\)"):
        _read("\nglobal_batch_size: 12\n", tmp_path)
    with pytest.raises(UserError, match=r"^--global-batch-size 12 [^()]*$"):
        _read("global_batch_size: 16\n", tmp_path, "--global-batch-size", "12")
    (tmp_path / "run.yaml").write_text("seed: 1\ninit_from: /nosuch\n")
    with pytest.raises(UserError, match=r"--init-from /nosuch: no such .*\(--init-from: line 2 of .*run.yaml\)"):
        fit(NetRecipe, config=tmp_path / "run.yaml", output_dir=tmp_path / "out", threads_per_rank=1)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("data", "output_dir", "init_from", "resume", "where")
    by_file = _read("".join(f"{name}: ~/x\n" for name in names), tmp_path)
    by_words = parse_options(
        _Options, {}, [f"--{name}=~/x" for name in names], program="x.py", description="X.", show=False
    )
    by_keywords = options_from_keywords(_Options, {}, dict.fromkeys(names, "~/x"))
    for options in (by_file, by_words, by_keywords, _Options(**dict.fromkeys(names, "~/x"))):
        for name in names:
            assert getattr(options, name) == (tmp_path / "x" if name == "where" else str(tmp_path / "x")), name
    assert options_from_keywords(_Options, {}, {"run_name": "~x", "words": ["~/x"]}).words == ("~/x",)
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    assert options_from_keywords(_Options, {}, {"config": "~/run.yaml"}).seed == 3
    with pytest.raises(UserError, match="--data ~nosuchuser/x: no home folder of that name"):
        _Options(data="~nosuchuser/x")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_with_a_range_is_finite(value: float) -> None:
    for name in ("lr", "weight_decay", "l1", "max_grad_norm", "momentum", "eps", "share"):
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} -?(inf|nan): must be"):
            _Options(**{name: value})
    assert repr(_Options(threshold=value).threshold) == repr(value)


def test_an_option_that_is_nan_equals_itself_at_a_resume(tmp_path: Path) -> None:
    given: dict[str, Any] = {"max_steps": 2, "threads_per_rank": 1, "output_dir": tmp_path}

    @dataclass(kw_only=True)
    class WithNan(NetOptions):
        threshold: float = math.nan
        ceilings: tuple[float, ...] = (math.inf, math.nan)

    class OfNan(NetRecipe):
        options: WithNan

    fit(OfNan, **given, stop_at_step=1)
    assert fit(OfNan, **given).step == 2
    assert "NaN" in (tmp_path / "run.json").read_text()
    with pytest.raises(UserError, match=r"--threshold: 'NaN' -> 1\.0"):
        fit(OfNan, **given, threshold=1.0)


def test_recipes_say_which_of_their_options_are_paths() -> None:
    paths = {"bert_imdb": "model", "gpt_lm": "tokenizer", "translate_seq2seq": "model", "vgg16_transfer": "weights"}
    for file, name in paths.items():
        recipe: type[Recipe] = recipe_class(file)
        for one in (name, "data", "output_dir", "init_from", "resume", "config"):
            assert is_path(options_type_of(recipe), one), (file, one)
