"""`ckpt diff` finds every difference and says how large it is."""

import math
from pathlib import Path

import pytest
import torch

from shardlaunch.checkpoints import comparing
from tests.unit.checkpoints.saved import RECIPE_RECORD, save_step, tensors
from tests.unit.launcher.commands.ckpt.conftest import Ckpt, make_run


def test_the_same_state_in_other_files_is_the_same(tmp_path: Path, ckpt: Ckpt) -> None:
    weights = tensors()
    one = save_step(tmp_path / "a", 2, weights=weights)
    # The same tensors in another order, so that the files differ.
    other = save_step(tmp_path / "b", 2, weights=dict(sorted(weights.items(), key=lambda it: it[0] != "layer.weight")))
    for words in ((one, one), (one, other), (one, other, "--weights-only")):
        ended = ckpt("diff", *words)
        assert (ended.status, ended.err) == (0, "")
        assert ended.out.endswith("the same\n")
    assert ckpt("diff", one, other, "--json").document["num_equal"] == 6


@pytest.mark.parametrize("piece_elements", [1 << 20, 3])
def test_differences_of_tensors_are_counted_and_measured(
    piece_elements: int, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "PIECE_ELEMENTS", piece_elements)
    weights = {
        "a": torch.tensor([1.0, 2.0, 4.0, math.nan, -0.0, math.inf]),
        "nan": torch.ones(4),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "count": torch.tensor([2**62, 5]),
        "mask": torch.tensor([True, False]),
        "shape": torch.ones(4),
        "dtype": torch.ones(2),
        "gone": torch.ones(1),
    }
    others = {name: tensor.clone() for name, tensor in weights.items() if name != "gone"}
    others["a"] = torch.tensor([1.0, 2.5, 3.0, math.nan, 0.0, math.inf])
    others["nan"][2] = math.nan
    others["half"][0], others["half"][4] = 0, 0.5
    others["count"][1] = 7
    others["mask"][0] = False
    others["shape"] = torch.ones(2, 2)
    others["dtype"] = torch.ones(2).double()
    others["new"] = torch.ones(1)
    one, other = save_step(tmp_path / "a", 2, weights=weights), save_step(tmp_path / "b", 2, weights=others)
    ended = ckpt("diff", one, other, "--weights-only", "--json")
    found = ended.document
    assert (ended.status, found["is_same"]) == (1, False)
    assert (found["only_in_one"], found["only_in_other"]) == (["gone"], ["new"])
    assert [(it["key"], it["one"], it["other"]) for it in found["other_form"]] == [
        ("shape", "4 float32", "2x2 float32"),
        ("dtype", "2 float32", "2 float64"),
    ]
    assert [
        (it["key"], it["num_differing"], it["num_elements"], it["largest_absolute"], it["largest_relative"])
        for it in found["tensors"]
    ] == [
        ("nan", 1, 4, "Infinity", "Infinity"),
        ("count", 1, 2, 2.0, pytest.approx(2 / 7)),
        ("a", 2, 6, 1.0, 0.25),
        ("half", 2, 5, 1.0, 1.0),
        ("mask", 1, 2, 1.0, 1.0),
    ]
    assert found["position"] == found["identity"] == {}
    text = ckpt("diff", one, other).out
    for part in ("1 tensors only in A: gone", "2x2 float32", "model: 5 tensors differ", "optimizer: 1 tensors differ"):
        assert part in text


def test_position_and_identity_count_and_other_options_do_not(tmp_path: Path, ckpt: Ckpt) -> None:
    weights = tensors()
    options = {"lr": 0.1, "seed": 0}
    one = save_step(tmp_path / "a", 2, weights=weights)
    free = save_step(tmp_path / "b", 2, weights=weights, recipe={**RECIPE_RECORD, "options": {**options, "seed": 1}})
    ended = ckpt("diff", one, free, "--json")
    assert (ended.status, ended.document["other_options"]) == (0, {"--seed": [0, 1]})
    run = {"identity": {"lr": 0.2}, "warn": {}}
    other = save_step(tmp_path / "c", 2, weights=weights, recipe={**RECIPE_RECORD, "run": run})
    ended = ckpt("diff", one, other, "--json")
    assert (ended.status, ended.document["identity"]) == (1, {"lr": [0.1, 0.2]})
    later = save_step(tmp_path / "d", 3, weights=weights)
    ended = ckpt("diff", one, later, "--json")
    assert (ended.status, ended.document["position"], ended.document["tensors"]) == (1, {"step": [2, 3]}, [])
    assert ckpt("diff", one, later, "--weights-only").status == 0


def test_tied_weights_are_found_under_any_of_their_names(tmp_path: Path, ckpt: Ckpt) -> None:
    weights = tensors()
    embedding = weights.pop("layer.weight")
    one = save_step(tmp_path / "a", 2, weights={**weights, "embedding": embedding}, aliases={"head": "embedding"})
    other = save_step(tmp_path / "b", 2, weights={**weights, "head": embedding}, aliases={"embedding": "head"})
    alone = save_step(tmp_path / "c", 2, weights={**weights, "head": embedding})
    assert ckpt("diff", one, other, "--weights-only").status == 0
    assert ckpt("diff", one, alone, "--weights-only").status == 0
    assert ckpt("diff", alone, one, "--weights-only").status == 0


def test_runs_are_compared_at_a_step(tmp_path: Path, ckpt: Ckpt) -> None:
    one, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", (2, 4))
    assert ckpt("diff", one, other).status == 1  # step 6 and step 4
    for step in (2, 4):
        assert ckpt("diff", one, other, "--step", step).status == 0
    assert ckpt("diff", one, other / "best", "--step", 4).status == 0
    ended = ckpt("diff", one, other, "--step", 6)
    assert (ended.status, ended.out) == (2, "")
    assert "has no checkpoint of step 6; it has 2, 4" in ended.err


def test_a_checkpoint_without_tensors(tmp_path: Path, ckpt: Ckpt) -> None:
    nothing = save_step(tmp_path / "a", 2, weights={})
    assert ckpt("diff", nothing, nothing).status == 0
    assert ckpt("diff", nothing, save_step(tmp_path / "b", 2)).status == 1
    assert ckpt("show", nothing).status == 0
    assert ckpt("export", nothing, tmp_path / "out").status == 0
