"""What a served model makes of a request: texts or a picture to classify, or a prompt to continue."""

import base64
import binascii
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import torch

from shardlaunch.checkpoints.names import CHECKPOINTS
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, open_path
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.output import warn
from shardlaunch.launcher.commands.generate import Sampling, Writer, check_length, open_writer
from shardlaunch.launcher.commands.predict import Classifier, open_classifier
from shardlaunch.launcher.commands.text_models import loaded
from shardlaunch.launcher.commands.trained import TrainedRun, open_run
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.launcher.toolkit.pixels import MODES, in_mode, opened, upright

Kind = Literal["text", "prompt", "image"]
_CLASSIFIES = "ForSequenceClassification"
_MOST_TEXTS = 256


class Texts(msgspec.Struct, forbid_unknown_fields=True):
    """A request to classify texts."""

    texts: list[str]


class Prompt(msgspec.Struct, forbid_unknown_fields=True):
    """A request to continue or transform a text."""

    prompt: str
    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0


class Image(msgspec.Struct, forbid_unknown_fields=True):
    """A request to classify a picture, a file in base64."""

    image: str


class Served(Protocol):
    """A model that answers requests."""

    @property
    def kind(self) -> Kind:
        """What it takes."""

    def answer(self, request: bytes) -> dict[str, Any]:
        """Return the answer to a request in JSON. Raises UserError, and msgspec's errors for what is no request."""


@dataclass(frozen=True, kw_only=True)
class ServedClassifier:
    """A classifier of texts, or a regression."""

    classifier: Classifier
    kind: Kind = "text"

    def answer(self, request: bytes) -> dict[str, Any]:
        """Return a prediction per text."""
        texts = msgspec.json.decode(request, type=Texts).texts
        if not 0 < len(texts) <= _MOST_TEXTS:
            raise UserError(f"texts: must be 1 to {_MOST_TEXTS}, not {len(texts)}")
        rows = self.classifier.predictions(texts)
        if self.classifier.is_regression:
            return {"predictions": [{"value": row[0]} for row in rows]}
        scores = [(row, _scores(self.classifier.labels, row)) for row in rows]
        if self.classifier.has_several_labels:
            return {"predictions": [{**found, "labels": self.classifier.chosen(row)} for row, found in scores]}
        return {"predictions": [found for _, found in scores]}


@dataclass(frozen=True, kw_only=True)
class ServedWriter:
    """A language model."""

    writer: Writer
    kind: Kind = "prompt"

    def answer(self, request: bytes) -> dict[str, Any]:
        """Return the text that follows a prompt, or what an encoder-decoder makes of it."""
        asked = msgspec.json.decode(request, type=Prompt)
        check_length(asked.max_new_tokens)
        sampling = Sampling(temperature=asked.temperature, top_k=asked.top_k, seed=asked.seed)
        return {"text": self.writer.text(asked.prompt, asked.max_new_tokens, sampling)}


@dataclass(frozen=True, kw_only=True)
class ServedImages:
    """A classifier of pictures, with the recipe that prepares them."""

    run: TrainedRun
    model: torch.nn.Module
    shape: tuple[int, ...]
    """Of a picture: height, width, channels."""
    kind: Kind = "image"

    def answer(self, request: bytes) -> dict[str, Any]:
        """Return the prediction for a picture, scaled and cropped to the size that the model was trained on."""
        from PIL import ImageOps

        try:
            data = base64.b64decode(msgspec.json.decode(request, type=Image).image, validate=True)
            image = in_mode(upright(opened({"bytes": data, "path": None}))[0], MODES[self.shape[2]])[0]
        except binascii.Error as error:
            raise UserError(f"image: is not in base64 ({error})") from error
        except (OSError, ValueError, SyntaxError) as error:  # of Pillow's decoders
            if isinstance(error, msgspec.MsgspecError):
                raise
            raise UserError(f"image: is not a readable picture ({error})") from error
        height, width, _ = self.shape
        pixels = np.array(ImageOps.fit(image, (width, height)), dtype=np.uint8).reshape(1, *self.shape)
        rows = {"pixels": torch.from_numpy(pixels), "labels": torch.zeros(1, dtype=torch.int64)}
        recipe = self.run.recipe
        with torch.no_grad():
            outputs = recipe.forward(self.model, recipe.collate(rows, None))
        logits = getattr(outputs, "logits", outputs).float()
        return {"predictions": [_scores(recipe.class_names, logits.softmax(dim=-1)[0].tolist())]}


@dataclass(frozen=True, kw_only=True)
class InTurn:
    """A served model that answers one request at a time."""

    served: Served
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: bytes) -> dict[str, Any]:
        """Return the answer to a request, when those before it are answered."""
        with self.lock:
            return self.served.answer(request)


def open_served(path: Path, *, ema: bool, recipe: str) -> Served:
    """Return the model of a run or a checkpoint. Raises UserError where it is of no kind that is served."""
    checkpoint = _checkpoint(path)
    if "tokenizer_config.json" in checkpoint.manifest.files:
        from transformers import AutoConfig

        architectures = loaded(checkpoint, AutoConfig, kind="text model").architectures or [""]
        if architectures[0].endswith(_CLASSIFIES):
            return ServedClassifier(classifier=open_classifier(checkpoint.step_dir, ema=ema))
        return ServedWriter(writer=open_writer(checkpoint.step_dir, ema=ema))
    run = open_run(checkpoint.step_dir, step=None, recipe_path=recipe, warn=warn, on_cpu=True)
    rows = run.load_data().splits["train"]
    columns: Mapping[str, torch.Tensor] = rows.columns if isinstance(rows, TensorData) else {}
    if "pixels" not in columns or columns["pixels"].dim() != 4 or not run.recipe.class_names:
        raise UserError(
            f"{checkpoint.step_dir}: a checkpoint of {checkpoint.recipe.recipe}; only classifiers of texts and "
            f"pictures and language models are served"
        )
    return ServedImages(run=run, model=run.model(ema=ema), shape=tuple(columns["pixels"].shape[1:]))


def _checkpoint(path: Path) -> Checkpoint:
    path = path.expanduser()
    if not (path / CHECKPOINTS).is_dir() and (path / "fold-1").is_dir():
        raise UserError(f"{path}: is a cross-validation; choose a fold, such as {path / 'fold-1'}")
    return open_path(path, peers=Peers(), warn=warn)


def _scores(labels: Any, row: list[float]) -> dict[str, Any]:
    best = max(range(len(row)), key=row.__getitem__)
    return {"label": labels[best], "scores": dict(zip(labels, row, strict=True))}
