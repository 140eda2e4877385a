"""Recipes for tests: small nets with everything that could make a run depend on its ranks."""

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.utilities import dim_zero_cat

from shardlaunch import Options, Recipe, TensorData, UserError, option
from shardlaunch.checkpoints.layout import CHECKPOINTS, TRAINER_STATE
from shardlaunch.demo import film_chats, toy_translations
from shardlaunch.launcher.launch import main
from shardlaunch.launcher.toolkit.demo_data import bert_dir
from shardlaunch.launcher.toolkit.metrics import CLASSIFICATION
from shardlaunch.metrics import named_metrics
from shardlaunch.recipes.bert_imdb import BertImdb
from shardlaunch.recipes.translate_seq2seq import TranslateSeq2Seq
from shardlaunch.text import contents_of, set_chat_template, train_tokenizer

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
NUM_FEATURES = 12
NUM_CLASSES = 3


@dataclass(kw_only=True)
class NetOptions(Options):
    """Options of the small net."""

    num_train: int = 203
    num_eval: int = 61
    global_batch_size: int = 32
    micro_batch_size: int = 4
    max_grad_norm: float = 1.0
    tracker: str = option("none", mark="free")


class Net(nn.Module):
    """A net with batch norm, dropout, tied weights and a parameter that the loss reaches only sometimes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, 16, bias=False)  # batch norm takes a bias away: its gradient is noise
        self.norm = nn.BatchNorm1d(16)
        self.middle = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.middle.weight
        self.rare = nn.Parameter(torch.ones(16))
        self.never = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(16, NUM_CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(self.norm(self.first(inputs)).relu(), 0.2, self.training)
        if inputs[0, 0] > 0.5:
            hidden = hidden * self.rare
        result: torch.Tensor = self.last(self.tied(self.middle(hidden).relu()))
        return result


class NetRecipe(Recipe):
    """Classify points of known classes; noise is added to them with the sample's own seed."""

    options: NetOptions
    best_metric = "accuracy"

    def datasets(self) -> Mapping[str, Any]:
        return {"train": _points(self.options.num_train, 1), "eval": _points(self.options.num_eval, 2)}

    def lengths(self, dataset: Any) -> np.ndarray | None:
        return (dataset.columns["inputs"][:, 0] * 100).long().numpy()

    def model(self) -> nn.Module:
        return Net()

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        if seeds is None:
            return samples
        noise = [torch.rand(NUM_FEATURES, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
        return {**samples, "inputs": samples["inputs"] + 0.1 * torch.stack(noise)}

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum")

    def metrics(self) -> Mapping[str, Any]:
        return named_metrics("accuracy", num_classes=NUM_CLASSES)


def _points(count: int, seed: int) -> TensorData:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return TensorData(
        inputs=torch.rand(count, NUM_FEATURES, generator=generator) + 0.2 * labels[:, None], labels=labels
    )


class LinearNet(NetRecipe):
    """A linear classifier on plain data: its steps can be computed by hand."""

    def model(self) -> nn.Module:
        return nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        return samples


class LabelSum(Metric):
    """Sum of the labels; its state is one scalar per batch."""

    full_state_update = False
    sums: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", [], dist_reduce_fx="cat")

    def update(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.sums.append(labels.sum())

    def compute(self) -> torch.Tensor:
        return dim_zero_cat(self.sums).sum()


class RankedNet(NetRecipe):
    """The net with a metric that keeps all predictions, one of scalars, a composed one, and counts."""

    best_metric = "auroc"

    def metrics(self) -> Mapping[str, Any]:
        counts = named_metrics(*CLASSIFICATION, num_classes=NUM_CLASSES)
        errors = 1 - named_metrics("accuracy", num_classes=NUM_CLASSES)["accuracy"]
        return {"auroc": MulticlassAUROC(num_classes=NUM_CLASSES), "errors": errors, "labels": LabelSum(), **counts}


class UnseededNet(NetRecipe):
    """A net whose training data differs from rank to rank."""

    def datasets(self) -> Mapping[str, Any]:
        inputs = torch.from_numpy(np.random.default_rng().random((9, NUM_FEATURES), dtype=np.float32))
        return {"train": TensorData(inputs=inputs, labels=torch.zeros(9, dtype=torch.int64))}


class PickyNet(NetRecipe):
    """A net that reports an error in its training data."""

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        if seeds is not None:
            raise UserError("this is not to my taste")
        return samples


class FewReviews(BertImdb):
    """A BERT on a few hundred of the demo's reviews."""

    def datasets(self) -> Mapping[str, Any]:
        splits = super().datasets()
        return {"train": splits["train"].select(range(301)), "eval": splits["eval"].select(range(45))}


class FewSentences(TranslateSeq2Seq):
    """An encoder-decoder on a few hundred sentences of the demo's grammar."""

    def datasets(self) -> Mapping[str, Any]:
        splits = super().datasets()
        return {"train": splits["train"].select(range(800)), "eval": splits["eval"].select(range(22))}


def save_small_bert(folder: Path) -> None:
    """Write the model folder of a small encoder: the demo's vocabulary, 2 layers, 64 wide, random weights."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(bert_dir())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_small_convnext(folder: Path) -> None:
    """Write the model folder of a small ConvNeXt with random weights, which expects images of 24 x 24."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ConvNextForImageClassification(config).save_pretrained(folder)
    expected = {"size": {"shortest_edge": 24}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(expected))


def save_small_t5(folder: Path) -> None:
    """Write the model folder of a small encoder-decoder: 1 layer each, 32 wide, random weights, a BPE tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = train_tokenizer(
        toy_translations()["eval"]["en"], vocab_size=300, pad_token="<pad>", eos_token="</s>", append_eos=True
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    model.generation_config.update(length_penalty=2.5, num_beams=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_small_gpt(folder: Path) -> None:
    """Write the model folder of a small language model: 2 layers, 32 wide, random weights, plain chat template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = [*contents_of(film_chats()["eval"]["messages"])]
    tokenizer = train_tokenizer(texts, vocab_size=300, bos_token="<|end|>", eos_token="<|end|>")
    set_chat_template(tokenizer, "plain")
    config = GPT2Config(vocab_size=300, n_positions=160, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe_class(name: str) -> type[Recipe]:
    """Return the recipe of a file of recipes/."""
    return _only_recipe(import_module(f"shardlaunch.recipes.{name}"))


def example(name: str) -> type[Recipe]:
    """Return the recipe of an example of the docs."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return _only_recipe(module)


def _only_recipe(module: ModuleType) -> type[Recipe]:
    (recipe_type,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == module.__name__
    ]
    return recipe_type


def run_quietly(recipe_type: type[Recipe], argv: list[str]) -> tuple[int, str]:
    """Run a recipe in this process and return (exit status, output)."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(recipe_type, argv)
    return status, output.getvalue()


def run_well(recipe_type: type[Recipe], argv: list[str]) -> str:
    """Run a recipe in this process, check that it succeeds, and return its output."""
    status, output = run_quietly(recipe_type, argv)
    assert status == 0, output
    return output


def training_lines(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]


def bits(output_dir: Path) -> tuple[list[dict[str, Any]], str, dict[str, bytes]]:
    """Return a run's lines of metrics without times, and position and tensors of its newest checkpoint."""
    position = (max((output_dir / CHECKPOINTS).iterdir()) / TRAINER_STATE).read_text()
    tensors = final_tensors(output_dir)
    as_bytes = {name: tensor.view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return training_lines(output_dir), position, as_bytes


def losses(output_dir: Path) -> dict[int, float]:
    """Return the loss of each step."""
    return {line["step"]: line["loss"] for line in training_lines(output_dir) if "loss" in line}


def final_tensors(output_dir: Path) -> dict[str, torch.Tensor]:
    """Return all tensors, weights and optimizer, of a run's newest checkpoint, by key."""
    from safetensors.torch import load_file

    newest = max((output_dir / "checkpoints").iterdir())
    tensors: dict[str, torch.Tensor] = {}
    for file in newest.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert key not in tensors, f"{key} stands in two files"
            tensors[key] = tensor
    return tensors


@dataclass(kw_only=True)
class MaskedOptions(Options):
    """Options of the small masked language model: M = 6 micro-batches, which 4 ranks cannot divide evenly."""

    global_batch_size: int = 12
    micro_batch_size: int = 2
    lr: float = 0.003
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    tracker: str = option("none", mark="free")
    eval_every: int = 1000


class MaskedBert(Recipe):
    """A small BERT that fills gaps: dropout, tied weights, two parameter groups, a parameter without a gradient."""

    options: MaskedOptions
    vocab_size = 101

    def datasets(self) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(1)
        start = torch.randint(3, self.vocab_size, (97, 1), generator=generator)
        return {"train": TensorData(inputs=3 + (start + torch.arange(9)) % (self.vocab_size - 3))}

    def model(self) -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=33,
            max_position_embeddings=9,
        )
        model = BertForMaskedLM(config)
        model.never = nn.Parameter(torch.ones(5))
        return model

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        assert seeds is not None
        masks = [torch.rand(9, generator=torch.Generator().manual_seed(int(seed))) < 0.3 for seed in seeds]
        mask = torch.stack(masks)
        mask[:, 0] = True
        return {"inputs": samples["inputs"].where(~mask, 1), "labels": samples["inputs"].where(mask, -100)}

    def num_targets(self, batch: Any) -> int:
        return int((batch["labels"] != -100).sum())

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch["inputs"]).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def export(self, folder: Path, model: Any) -> None:
        model.config.save_pretrained(folder)
