"""A method that is named almost as a hook, and that nothing calls, is refused; methods of other uses are left alone."""

from typing import Any

import pytest

from shardlaunch import Options, Recipe, UserError
from shardlaunch.launcher.recipe import check_in_effect
from shardlaunch.recipes.bert_imdb import BertImdb
from shardlaunch.recipes.cifar_cnn import CifarCnn
from shardlaunch.recipes.gpt_lm import GptLm
from shardlaunch.recipes.mnist_mlp import MnistMlp
from shardlaunch.recipes.translate_seq2seq import TranslateSeq2Seq
from shardlaunch.recipes.vgg16_transfer import Vgg16Transfer
from tests import recipes

OURS = [BertImdb, CifarCnn, GptLm, MnistMlp, TranslateSeq2Seq, Vgg16Transfer]
TESTS = [value for value in vars(recipes).values() if isinstance(value, type) and issubclass(value, Recipe)]


def recipe_with(*names: str, base: type[Recipe] = Recipe) -> type[Recipe]:
    """Return a recipe that has methods of these names."""
    lines = [f"    def {name}(self): return {number}" for number, name in enumerate(names)]
    namespace: dict[str, Any] = {"Base": base, "__name__": "a_file_of_its_own"}
    exec("\n".join(["class Own(Base):", *lines]), namespace)
    own: type[Recipe] = namespace["Own"]
    return own


def check(recipe_type: type[Recipe]) -> None:
    """Check a recipe as the start of a run does."""
    check_in_effect(recipe_type(Options()))


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("dataset", "datasets"),
        ("train_dataset", "datasets"),
        ("collate_fn", "collate"),
        ("optimizers", "optimizer"),
        ("scheduler", "schedule"),
        ("metric", "metrics"),
        ("compute_metrics", "metrics"),
        ("lossfn", "loss"),
        ("num_target", "num_targets"),
    ],
)
def test_names_near_a_hooks(name: str, hook: str) -> None:
    with pytest.raises(UserError, match=rf"Own\.{name}\(\) is never called; did you mean {hook}\(\)\?"):
        check(recipe_with(name))
    check(recipe_with(name, hook))


def test_a_base_with_the_hook_does_not_excuse_it() -> None:
    with pytest.raises(UserError, match="did you mean datasets"):
        check(recipe_with("dataset", base=recipe_with("datasets")))


class OldMetrics(Recipe):
    """A recipe of release 0.1."""

    def update(self, metrics: Any, outputs: Any, batch: Any) -> None:
        metrics["loss"].update(outputs)


class OldFlags(Recipe):
    """Another."""

    def given(self, *names: str) -> list[str]:
        return list(names)


@pytest.mark.parametrize(("old", "new"), [(OldMetrics, "update_metrics"), (OldFlags, "explicitly_set_flags")])
def test_old_names(old: type[Recipe], new: str) -> None:
    with pytest.raises(UserError, match=rf"is now {new}\(\)\. Rename it"):
        check(old)


class Helpers(Recipe):
    """A recipe with methods for its own use, one called by text, others by a function of the module or a property."""

    def dataset(self, name: str) -> str:
        return name

    def datasets(self) -> Any:
        return {}

    def metric(self) -> int:
        return 1

    def losses(self) -> int:
        return getattr(self, "compute_loss")()  # noqa: B009

    def compute_loss(self) -> int:
        return 1

    def update(self, count: int) -> int:
        return count

    def _scheduler(self) -> int:
        return self.update(1)

    @property
    def both(self) -> int:
        return self.losses()


def of_module(recipe: Helpers) -> int:
    """Return what a method of the recipe gives."""
    return recipe.metric()


@pytest.mark.parametrize("recipe_type", [Helpers, *OURS, *TESTS])
def test_what_is_left_alone(recipe_type: type[Recipe]) -> None:
    check(recipe_type)
