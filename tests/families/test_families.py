"""Families of models through the text recipes, compared with plain transformers on each text alone.

Among all tests, one family of each kind; `make test-families` compares all of them.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shardlaunch.launcher.toolkit.families import CLASSIFIERS, PACKING_MODELS, ROW_MODELS, TRANSLATORS
from tests.families.comparing import Refused, classifier, language_model, translator

ALL = bool(os.environ.get("SHARDLAUNCH_ALL_FAMILIES"))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
# Those whose results depend on padding, or which transformers cannot train as this recipe does.
REFUSED_CLASSIFIERS = ("convbert", "fnet", "funnel", "mobilebert", "nystromformer", "yoso")
REFUSED_LANGUAGE_MODELS = ("bert", "electra", "roberta", "xlm", "xlnet", "xlstm")
REFUSED_TRANSLATORS = ("fsmt", "nllb-moe")
KINDS: dict[str, tuple[Callable[..., None], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # kind: (comparison, options, all families, one of each kind)
    "classifier": (classifier, (), CLASSIFIERS, ("bert", "gpt2", "xlnet")),
    "packed language model": (language_model, (), PACKING_MODELS, ("llama",)),
    "language model, --no-packing": (language_model, ("--no-packing",), ROW_MODELS, ("mamba", "mixtral")),
    "encoder-decoder": (translator, (), TRANSLATORS, ("m2m_100", "t5")),
}
REFUSED = {
    "classifier": REFUSED_CLASSIFIERS,
    "language model, --no-packing": REFUSED_LANGUAGE_MODELS,
    "encoder-decoder": REFUSED_TRANSLATORS,
}


@pytest.mark.parametrize(
    ("kind", "family"), [(kind, name) for kind, (*_, every, few) in KINDS.items() for name in (every if ALL else few)]
)
def test_a_family_is_equal_to_transformers(
    kind: str, family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    compare, options, *_ = KINDS[kind]
    compare(family, tmp_path, *options)
    record_property("family", (kind, family, "equal"))


@pytest.mark.parametrize(
    ("kind", "family"), [(kind, name) for kind, names in REFUSED.items() for name in (names if ALL else names[:1])]
)
def test_a_family_that_is_refused(
    kind: str, family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One message at the start names the model type."""
    compare, options, *_ = KINDS[kind]
    with pytest.raises(Refused, match=f"model type '{family}'"):
        compare(family, tmp_path, *options)
    record_property("family", (kind, family, "refused"))


@pytest.mark.parametrize("family", REFUSED_CLASSIFIERS if ALL else REFUSED_CLASSIFIERS[1:2])
def test_without_padding_they_are_equal_too(family: str, tmp_path: Path) -> None:
    classifier(family, tmp_path, "--micro-batch-size", "1")


def test_the_page_lists_them() -> None:
    text = PAGE.read_text()
    for kind, (*_, every, _few) in KINDS.items():
        assert f"| {kind} | {len(every)} | {', '.join(every)} |" in text, kind
    for kind, names in REFUSED.items():
        assert f"| {kind} | {', '.join(names)} |" in text, kind
