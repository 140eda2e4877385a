"""The losses of every recipe's demo are the recorded ones: a change that moves all strategies alike is seen too."""

from pathlib import Path

import pytest

from tests.golden.demos import ARGV, COMMAND, LEFT_OUT, NUM_STEPS, RECIPES, demo_losses, recorded, versions

BOUND = 1e-5
FOLDER = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_those_of_the_record(recipe: str, tmp_path: Path) -> None:
    record = recorded()
    expected = record["losses"][recipe]
    found = demo_losses(recipe, tmp_path / "run")
    others = {name: f"{record['versions'][name]} -> {here}" for name, here in versions().items()}
    changed = [f"{name} {both}" for name, both in others.items() if len(set(both.split(" -> "))) == 2]
    why = f"since the record: {', '.join(changed) or 'the same versions'}. If it is meant to be so: {COMMAND}"
    assert found == pytest.approx(expected, abs=BOUND, rel=0), why


def test_the_record_is_whole() -> None:
    assert {*RECIPES, *LEFT_OUT} == {path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    record = recorded()
    assert (record["command"], record["options"]) == (COMMAND, " ".join(ARGV))
    assert {recipe: len(losses) for recipe, losses in record["losses"].items()} == dict.fromkeys(RECIPES, NUM_STEPS)
