"""Each recipe is trained with each optimizer: its defaults for its own one do not stand in the way."""

import pytest

from shardlaunch import Options
from shardlaunch.launcher.command_line.parsing import parse_options
from shardlaunch.launcher.optimization.optimizers import NAMES, check_optimizer_options
from shardlaunch.launcher.recipe import options_type_of
from tests.golden.demos import RECIPES
from tests.recipes import recipe_class


@pytest.mark.parametrize("name", RECIPES)
def test_any_optimizer_by_name(name: str) -> None:
    recipe_type = recipe_class(name)
    for optimizer in NAMES:
        words = ["--optimizer", optimizer]
        options = parse_options(options_type_of(recipe_type), recipe_type.presets, words, program="x", description="")
        assert isinstance(options, Options)
        assert options.optimizer == optimizer
        check_optimizer_options(options)
