"""The commands that take a run or a checkpoint, with their options. Each imports what it needs when it is called."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from shardlaunch.errors import UserError

_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
_Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")]


def evaluate(
    run: tyro.conf.Positional[Path],
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA")] = (),
    split: str = "",
    step: int | None = None,
    ema: _Flag = False,
    output: Path | None = None,
    recipe: str = "",
    as_json: _Json = False,
) -> int:
    """Evaluate a checkpoint with all metrics of its recipe, on the run's own data or on other data.

    Writes RUN/evaluations/NAME.json, and prints one table. On the run's evaluation data, the figures are those that the
    run itself has logged for the step.

    Args:
        run: A run's output folder (its newest checkpoint, or that of --step), or a checkpoint folder.
        data: Other data, in a form that the recipe's --data takes, with the same columns (default: the run's own).
        split: Split to evaluate on (default: eval; of other data the one that is held out, or the only one).
        step: Step of the checkpoint.
        ema: Use the average of the weights that the run keeps (--ema, --ema-half-life, --swa-from).
        output: File to write instead of RUN/evaluations/NAME.json.
        recipe: Recipe file or name, where the run's is not where it was.
        as_json: Print one JSON document.
    """
    from shardlaunch.launcher.commands.evaluate import evaluate_run

    return evaluate_run(run, data=data, split=split, step=step, ema=ema, output=output, recipe=recipe, as_json=as_json)


def predict(
    checkpoint: tyro.conf.Positional[Path],
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
    file: Path | None = None,
    data: str = "",
    text_column: str = "",
    output: Path | None = None,
    ema: bool = False,
) -> int:
    """Classify texts: print the label and all probabilities, or the number that a regression predicts.

    With --data, write a table with all columns of the data, the label and the score of each class.

    Args:
        checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
        text: Texts to classify.
        file: File with one text per line.
        data: Table of texts, a CSV, JSON lines or parquet file; needs --output.
        text_column: Column of the texts in --data (default: as in training).
        output: File to write the rows of --data to: .csv, .jsonl or .parquet.
        ema: Use the average of the weights that the run keeps (--ema, --ema-half-life, --swa-from).
    """
    if data and (text or file):
        raise UserError("--data: not with --text and --file; give one of them")
    if data:
        from shardlaunch.launcher.commands.predict_file import predict_rows

        predict_rows(checkpoint, data=data, text_column=text_column, output=output, ema=ema)
        return 0
    if text_column or output:
        raise UserError("--text-column, --output: only with --data")
    from shardlaunch.launcher.commands.predict import predict_texts

    predict_texts(checkpoint, texts=text, file=file, ema=ema)
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
    ema: bool = False,
    chat: bool = False,
) -> int:
    """Generate texts with a language model: continuations of prompts, answers, or outputs of an encoder-decoder.

    Args:
        checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
        prompt: Texts to continue, translate or summarize.
        file: File with one prompt per line.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature (0: always the most probable token).
        top_k: Sample from the N most probable tokens (0: from all).
        num_beams: Beams of a beam search (0: as in the checkpoint, else one).
        seed: Random seed for sampling.
        ema: Use the average of the weights that the run keeps (--ema, --ema-half-life, --swa-from).
        chat: Take each prompt as the message of a user, through the tokenizer's chat template, and print the answer.
    """
    from shardlaunch.launcher.commands.generate import Sampling, generate_texts

    sampling = Sampling(temperature=temperature, top_k=top_k, num_beams=num_beams, seed=seed)
    generate_texts(
        checkpoint, prompts=prompt, file=file, max_new_tokens=max_new_tokens, sampling=sampling, ema=ema, chat=chat
    )
    return 0


def report(
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")],
    output: Path | None = None,
) -> int:
    """Write one HTML page on runs side by side: curves, what differs, time, memory, faults, samples of outputs.

    The page needs no network and nothing beside it. Long runs are thinned out in it.

    Args:
        runs: Output folders of runs, finished or not; of a cross-validation, all folds.
        output: File to write (default: report.html, in the run's folder if there is one run).
    """
    from shardlaunch.launcher.commands.report.main import write_report

    return write_report(runs, output=output)


def export(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    format_: Annotated[str, tyro.conf.arg(name="format", metavar="FORMAT")],
    step: int | None = None,
    ema: _Flag = False,
    recipe: str = "",
    quantize: str = "",
) -> int:
    """Write a run's whole model for other tools, load it in a fresh process, and compare its outputs.

    The outputs are those on batches of the run's evaluation data; the largest difference is printed. A model that
    cannot be written in the format is refused with the reason, and nothing is written then. Sizes that change from
    batch to batch, such as the number of samples, may be any in the exported model.

    Args:
        run: A run's output folder (its newest checkpoint, or that of --step), or a checkpoint folder.
        out: Folder to write, which does not exist yet.
        format_: hf (transformers models; adapters merged), safetensors (weights), torch-export, onnx or torchscript.
        step: Step of the checkpoint.
        ema: Use the average of the weights that the run keeps (--ema, --ema-half-life, --swa-from).
        recipe: Recipe file or name, where the run's is not where it was.
        quantize: int8: store weights of linear layers in 8 bits (hf, torch-export), and print what that changes.
    """
    from shardlaunch.launcher.commands.export.main import export_run

    return export_run(run, out, kind=format_, step=step, ema=ema, recipe=recipe, quantize=quantize)


def serve(
    run: tyro.conf.Positional[Path],
    port: int = 8000,
    host: str = "127.0.0.1",
    ema: _Flag = False,
    recipe: str = "",
) -> int:
    """Serve a model on this machine, to try it: a page, and POST /predict with JSON.

    For classifiers of texts and of pictures, and language models. One request is answered at a time; it is no server
    for many users.

    Args:
        run: A run's output folder (its newest checkpoint), or a checkpoint folder.
        port: Port (0: any that is free).
        host: Address to listen at; others than that of this machine alone let everyone use the model.
        ema: Use the average of the weights that the run keeps (--ema, --ema-half-life, --swa-from).
        recipe: Recipe file or name, where that of a model of pictures is not where it was.
    """
    from shardlaunch.launcher.commands.serve.main import serve_run

    return serve_run(run, host=host, port=port, ema=ema, recipe=recipe)


def push(
    run: tyro.conf.Positional[Path],
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")],
    public: _Flag = False,
    revision: str = "",
    message: str = "",
    step: int | None = None,
    ema: _Flag = False,
    merge: _Flag = False,
) -> int:
    """Upload a model to a hub: that of a run or checkpoint, or a folder that an export has written.

    The repository is made where it does not exist. Its earlier files of weights are replaced, in the same commit. The
    hub is huggingface.co, or that of HF_ENDPOINT; the token that of `hf auth login` or HF_TOKEN.

    Args:
        run: A run's output folder (its newest checkpoint, or that of --step), a checkpoint, or an exported model.
        repository: Name of the repository on the hub.
        public: Make a new repository public (default: private). One that exists stays as it is.
        revision: Branch to write to (default: main).
        message: Message of the commit.
        step: Step of the checkpoint.
        ema: Use the average of the weights that the run keeps (--ema, --ema-half-life, --swa-from).
        merge: Merge a LoRA adapter into its base model (default: the adapter alone).
    """
    from shardlaunch.launcher.commands.push import push_model

    return push_model(
        run, repository, public=public, revision=revision, message=message, step=step, ema=ema, merge=merge
    )


COMMANDS: dict[str, Callable[..., int]] = {
    "predict": predict,
    "generate": generate,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "serve": serve,
    "push": push,
}
