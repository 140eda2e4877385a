"""The console command `shardlaunch`: run a recipe on several ranks, compare strategies, use a checkpoint."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import tyro

from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.generate import Sampling, generate_texts
from shardlaunch.launcher.commands.parity import compare_strategies
from shardlaunch.launcher.commands.predict import predict_texts
from shardlaunch.launcher.commands.start import run_recipe
from shardlaunch.launcher.launch import EXIT_INTERRUPTED, EXIT_USER_ERROR

_DESCRIPTION = f"""shardlaunch {version("shardlaunch")}: one run, any shards.

  shardlaunch run recipes/bert_imdb.py --ranks 2 -- --preset demo
  shardlaunch parity recipes/bert_imdb.py --ranks 2 --steps 20 -- --preset demo
  shardlaunch predict outputs/bert_imdb-demo --text "a wonderful film"
  shardlaunch generate outputs/gpt_lm-demo --prompt "The film" --temperature 0.8
"""


def main() -> None:
    """Run the command that the command line names and exit."""
    argv = sys.argv[1:]
    recipe_argv: list[str] = []
    if "--" in argv:
        position = argv.index("--")
        argv, recipe_argv = argv[:position], argv[position + 1 :]
    if argv in (["--version"], ["-V"]):
        print(f"shardlaunch {version('shardlaunch')}")
        return

    def run(recipe: tyro.conf.Positional[Path], ranks: int = 0, strategy: str = "auto") -> int:
        """Run a recipe file; what follows ` -- ` goes to the recipe.

        Args:
            recipe: The recipe's file.
            ranks: Processes to start on this machine; 0: one a GPU, or one where there is none.
            strategy: single, dp, ddp, fsdp2, hsdp, zero1, zero2, zero3, or auto: ddp on several ranks.
        """
        return run_recipe(recipe, recipe_argv, ranks=ranks, strategy=strategy)

    def parity(
        recipe: tyro.conf.Positional[Path],
        ranks: int = 2,
        steps: int = 20,
        strategies: tuple[str, ...] = (),
        tolerance: float = 1e-4,
    ) -> int:
        """Run a recipe for some steps under each strategy and show how far its losses and weights differ.

        What follows ` -- ` goes to the recipe. The exit status is 1 when a strategy failed or differs.

        Args:
            recipe: The recipe's file.
            ranks: Processes a strategy; the reference is a run on one.
            steps: Steps to run.
            strategies: Those to compare; none: all for several ranks.
            tolerance: The largest difference of a step's loss that counts as the same run.
        """
        return compare_strategies(
            recipe, recipe_argv, ranks=ranks, steps=steps, strategies=strategies, tolerance=tolerance
        )

    def predict(
        checkpoint: tyro.conf.Positional[Path],
        text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
        file: Path | None = None,
    ) -> int:
        """Print the label and the probabilities that a text classifier gives to texts.

        Args:
            checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
            text: Texts to classify.
            file: A file with one text a line.
        """
        if recipe_argv:
            raise UserError("predict takes nothing after ` -- `")
        predict_texts(checkpoint, texts=text, file=file)
        return 0

    def generate(
        checkpoint: tyro.conf.Positional[Path],
        prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
        file: Path | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int = 0,
        num_beams: int = 0,
        seed: int = 0,
    ) -> int:
        """Print texts of a language model: prompts and their continuations, or what an encoder-decoder makes of them.

        Args:
            checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
            prompt: Texts to begin with, or to translate or summarise.
            file: A file with one prompt a line.
            max_new_tokens: Tokens to write at most.
            temperature: Draw tokens at random, the higher the more freely; 0: take the most probable.
            top_k: Draw from so many most probable tokens; 0: from all.
            num_beams: Beams of a search for the most probable text; 0: as many as the checkpoint says, or one.
            seed: Decides what is drawn.
        """
        if recipe_argv:
            raise UserError("generate takes nothing after ` -- `")
        sampling = Sampling(temperature=temperature, top_k=top_k, num_beams=num_beams, seed=seed)
        generate_texts(checkpoint, prompts=prompt, file=file, max_new_tokens=max_new_tokens, sampling=sampling)
        return 0

    try:
        sys.exit(
            tyro.extras.subcommand_cli_from_dict(
                {"run": run, "parity": parity, "predict": predict, "generate": generate},
                prog="shardlaunch",
                description=_DESCRIPTION,
                args=argv,
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
