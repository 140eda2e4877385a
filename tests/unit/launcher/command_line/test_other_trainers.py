"""Option names of other trainers, and the advice on them."""

import re
from dataclasses import dataclass, fields

import pytest

from shardlaunch import Options, UserError, option
from shardlaunch.launcher.command_line import other_trainers
from shardlaunch.launcher.command_line.other_trainers import advice
from shardlaunch.launcher.command_line.parsing import parse_options

OURS = {f.name for f in fields(Options)}
OF_RECIPES = {"model", "max_length"}  # of bert_imdb, gpt_lm and translate_seq2seq
OF_LAUNCHERS = {"ranks", "nnodes"}


@dataclass(kw_only=True)
class _Options(Options):
    warmup: int = option(0)


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("learning_rate", "--lr"),
        ("batch_size", "--global-batch-size"),
        ("train_batch_size", "--global-batch-size"),
        ("per_device_train_batch_size", "--micro-batch-size"),
        ("per_device_eval_batch_size", "--eval-micro-batch-size"),
        ("gradient_accumulation_steps", "--global-batch-size"),
        ("num_train_epochs", "--epochs"),
        ("max_epochs", "--epochs"),
        ("bf16", "--precision bf16"),
        ("fp16", "--precision fp16"),
        ("evaluation_strategy", "--eval-every"),
        ("eval_strategy", "--eval-every"),
        ("eval_steps", "--eval-every"),
        ("warmup", "--warmup-steps"),
        ("lr_scheduler_type", "--schedule"),
        ("devices", "--ranks"),
        ("num_nodes", "--nnodes"),
        ("logging_steps", "--log-every"),
        ("save_steps", "--save-every"),
        ("save_total_limit", "--keep"),
        ("load_best_model_at_end", "--save-on-best"),
        ("report_to", "--tracker"),
        ("resume_from_checkpoint", "--resume"),
        ("dataloader_num_workers", "--num-workers"),
        ("optim", "--optimizer"),
        ("overwrite_output_dir", "--output-dir"),
        ("do_train", "a run always trains"),
        ("lora_r", "--lora-rank"),
        ("use_dora", "--dora"),
        ("lora_target_modules", "--lora-targets"),
    ],
)
def test_a_word_of_another_trainer_is_answered_with_ours(word: str, ours: str) -> None:
    assert ours in advice(word, OURS)
    with pytest.raises(UserError, match=f"^--{word.replace('_', '-')}: .*{ours}"):
        parse_options(Options, {}, [f"--{word.replace('_', '-')}", "1"], program="x.py", description="")


def test_only_options_that_exist_are_named() -> None:
    for word, text in other_trainers._ADVICE.items():
        assert word not in OURS
        for name in re.findall(r"--([a-z0-9-]+)", text):
            assert name.replace("-", "_") in OURS | OF_RECIPES | OF_LAUNCHERS, text


def test_all_words_of_a_command_line_are_answered_at_once() -> None:
    words = ["--learning-rate", "1", "--bf16", "True", "--epoch=3"]
    with pytest.raises(UserError) as caught:
        parse_options(Options, {}, words, program="x.py", description="")
    assert str(caught.value).splitlines() == [
        "--learning-rate: did you mean --lr?",
        "--bf16: did you mean --precision bf16?",
        "--epoch: unknown option; did you mean --epochs?",
    ]


def test_what_a_recipe_does_not_have_is_not_named_and_its_own_words_are_its_own() -> None:
    assert "--model?" in advice("model_name_or_path", OURS | {"model"})
    assert "--model?" not in advice("model_name_or_path", OURS)
    assert parse_options(_Options, {}, ["--warmup", "3"], program="x.py", description="").warmup == 3
