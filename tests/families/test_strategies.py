"""A family of each kind under the strategies on two ranks: the loss of one process, in `make test-families`."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.families.comparing import trained, write_rows
from tests.families.models import save_model, save_tokenizer
from tests.families.test_families import ALL
from tests.recipes import losses

LENGTHS = ("--max-source-length", "20", "--max-target-length", "20")
COLUMNS = ("--source-column", "text", "--target-column", "target")
TRANSLATION = (*COLUMNS, "--num-beams", "1", "--metrics", "chrf", *LENGTHS)
CONTEXT = ("--context-length", "16")
# (family, recipe, tokenizer, options)
FAMILIES = (
    ("bert", "bert_imdb", "cls", ("--max-length", "16")),
    ("xlnet", "bert_imdb", "cls", ("--max-length", "16")),
    ("llama", "gpt_lm", "plain", CONTEXT),
    ("mamba", "gpt_lm", "plain", (*CONTEXT, "--no-packing")),
    ("mixtral", "gpt_lm", "plain", (*CONTEXT, "--no-packing")),
    ("m2m_100", "translate_seq2seq", "end", TRANSLATION),
    ("t5", "translate_seq2seq", "end", TRANSLATION),
)
AUTO = {"bert_imdb": "SequenceClassification", "gpt_lm": "CausalLM", "translate_seq2seq": "Seq2SeqLM"}


def run(recipe: str, argv: list[str], output_dir: Path) -> tuple[float, dict[int, float]]:
    """Train for six steps; return the evaluation loss and those of the steps. All ranks."""
    found, _ = trained(recipe, [*argv, "--max-steps", "6", "--micro-batch-size", "2"], output_dir)
    return found, losses(output_dir)


@pytest.mark.skipif(not ALL, reason="a long form: make test-families")
@pytest.mark.parametrize(("family", "recipe", "kind", "options"), FAMILIES, ids=[entry[0] for entry in FAMILIES])
def test_strategies(family: str, recipe: str, kind: str, options: tuple[str, ...], tmp_path: Path) -> None:
    import transformers

    tokenizer = save_tokenizer(tmp_path / "model", kind=kind, family=family)
    auto_class = getattr(transformers, f"AutoModelFor{AUTO[recipe]}")
    # Ranks that drop different layers cannot gather modules together: FSDP2 and ZeRO 3 refuse that.
    drop = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0} if family == "m2m_100" else {}
    save_model(tmp_path / "model", auto_class, family, tokenizer=tokenizer, **drop)
    write_rows(tmp_path)
    argv = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), *options]
    (expected, expected_steps), *_ = run_on_ranks(1, run, recipe, argv, tmp_path / "single")
    for strategy in ("ddp", "fsdp2", "zero3"):
        words = [*argv, "--strategy", strategy]
        (found, steps), *_ = run_on_ranks(2, run, recipe, words, tmp_path / strategy)
        assert found == pytest.approx(expected, abs=1e-5), strategy
        assert steps == pytest.approx(expected_steps, abs=1e-6), strategy
