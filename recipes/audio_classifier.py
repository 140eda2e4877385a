"""Classification of sounds: a convolutional net on log-mel spectrograms, or a pretrained model of transformers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, launch, option, sounds
from shardlaunch.metrics import named_metrics
from shardlaunch.sounds import LogMel, MelScale, SoundOptions, Spectrograms
from shardlaunch.text import from_config, from_source, num_labels_to_load, pretrained_weights, save_config

DEMO = demo.DEMO
SAMPLE_RATE = 16000  # of a net from scratch
LONGEST_S = 10.0  # of a clip, where --seconds says nothing
FROM_SCRATCH = ("width", "dropout", "num_mels", "window_ms", "hop_ms", "mel_scale")
MASKS = ("time_mask", "frequency_mask")
NUM_STAGES = 4  # of the net from scratch: each halves the spectrogram and doubles the channels


@dataclass(kw_only=True)
class AudioClassifierOptions(SoundOptions):
    """Options of the audio classifier recipe."""

    data: str = option(DEMO, mark="free")
    """Sounds with labels: a Hub id, a local path, or demo (syllables that a formula makes)."""
    model: str = option("", is_path=True)
    """Pretrained model to fine-tune: a Hub id or a local folder (default: a convolutional net from scratch)."""
    seconds: float = option(0.0, minimum=0)
    """Length of the clips: longer sounds are cropped, shorter ones padded (0: as the longest training sound, up to 10
    or what the pretrained model takes)."""
    sample_rate: int = option(0, minimum=0)
    """Sample rate in Hz, to which others are resampled (0: what the pretrained model expects, and 16000 from
    scratch)."""
    num_mels: int = option(64, minimum=16)
    """Bands of the spectrograms."""
    window_ms: float = option(25.0, above=0)
    """Length of the frames of a spectrogram in milliseconds."""
    hop_ms: float = option(10.0, above=0)
    """Milliseconds from the start of a frame to that of the next one."""
    mel_scale: MelScale = "htk"
    """Scale of the bands: htk, or slaney as librosa has it."""
    width: int = option(32, minimum=1)
    """Channels of the net's first stage; the last one, the fourth, has eight times as many."""
    dropout: float = option(0.0, minimum=0, below=1)
    """Dropout before the net's last layer."""
    label_smoothing: float = option(0.0, minimum=0, below=1)
    """Label smoothing, also in the evaluation loss."""
    metrics: tuple[str, ...] = option(("accuracy", "f1_macro"), mark="free")
    """Evaluation metrics; the best checkpoint goes by the first."""
    epochs: int = 20
    global_batch_size: int = 64
    micro_batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "cosine"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0


class AudioClassifier(Recipe):
    """Train a classifier of sounds (AdamW, warm-up and cosine schedule)."""

    options: AudioClassifierOptions
    presets = {
        DEMO: {
            **{"data": DEMO, "sample_rate": 8000, "seconds": 1.0, "num_mels": 32, "hop_ms": 20.0, "width": 16},
            **{"time_mask": 6, "frequency_mask": 4, "epochs": 8, "lr": 3e-3, "micro_batch_size": 16},
        },
    }

    def datasets(self) -> Mapping[str, Any]:
        options = self.options
        self.inputs = self._inputs()
        rate = self.inputs.sample_rate
        if options.seconds:  # what cannot be is said before the data is read
            self._set_clips(round(options.seconds * rate))
        splits, self.class_names = sounds.load_sounds(options, sample_rate=rate)
        if not options.seconds:
            most = self.inputs.longest or int(LONGEST_S * rate)
            self._set_clips(min(most, int(sounds.lengths_of(splits["train"]).max())))
        sounds.note_lengths(splits, num_samples=self.num_samples, sample_rate=rate)
        return splits

    def _inputs(self) -> sounds.Inputs:
        """Return what the net takes of clips. Raises UserError for options that have no effect."""
        options = self.options
        if not options.model:
            rate = options.sample_rate or SAMPLE_RATE
            log_mel = LogMel(
                sample_rate=rate,
                window=max(1, round(rate * options.window_ms / 1000)),
                hop=max(1, round(rate * options.hop_ms / 1000)),
                num_mels=options.num_mels,
                scale=options.mel_scale,
            )
            return Spectrograms(log_mel)
        if unused := self.explicitly_set_flags(*FROM_SCRATCH):
            raise UserError(f"{', '.join(unused)}: only for a net from scratch, not with --model {options.model}")
        self.preprocessor = sounds.preprocessor(options.model)
        inputs = sounds.expected_inputs(self.preprocessor, options.model)
        if self.explicitly_set_flags("sample_rate") and options.sample_rate not in (0, inputs.sample_rate):
            raise UserError(
                f"--sample-rate {options.sample_rate}: --model {options.model} expects {inputs.sample_rate}; remove it"
            )
        return inputs

    def _set_clips(self, num_samples: int) -> None:
        """Set the length of the clips. Raises UserError for one that cannot be, and for masks that are too wide."""
        options, inputs = self.options, self.inputs
        if 0 < inputs.longest < num_samples:
            if self.explicitly_set_flags("seconds"):
                most = f"takes {inputs.longest / inputs.sample_rate:g} at most"
                raise UserError(f"--seconds {options.seconds:g}: --model {options.model} {most}; lower it")
            num_samples = inputs.longest
        self.num_samples, shape = num_samples, inputs.shape(num_samples)
        self.has_spectrograms = shape is not None
        if shape is None:
            if unused := self.explicitly_set_flags(*MASKS):
                flags = ", ".join(unused)
                raise UserError(
                    f"{flags}: only for spectrograms, but --model {options.model} takes waveforms; remove it"
                )
            return
        if not shape[0]:
            raise UserError(f"clips of {num_samples} samples are shorter than a frame; set a longer --seconds")
        sounds.require_room_for_masks(options, num_frames=shape[0], num_mels=shape[1])

    def model(self) -> nn.Module:
        options = self.options
        if not options.model:
            num_classes, num_mels = len(self.class_names), options.num_mels
            return sound_net(num_classes, num_mels=num_mels, width=options.width, dropout=options.dropout)
        from transformers import AutoConfig, AutoModelForAudioClassification

        labels = dict(enumerate(self.class_names))
        config = from_source(AutoConfig, options.model)
        self.num_labels = num_labels_to_load(config, self.class_names)
        config.id2label, config.label2id = labels, {name: number for number, name in labels.items()}
        if hasattr(config, "layerdrop"):
            config.layerdrop = 0.0  # ranks that drop other layers could not gather the same ones
        model: nn.Module = from_config(AutoModelForAudioClassification, config, options.model)
        self._require_inputs_of(model)
        return model

    def _require_inputs_of(self, model: Any) -> None:
        """Raise UserError for a model that does not take what its preprocessor makes of clips.

        Those of waveforms need as many frames as a mask that they lay on them in training.
        """
        shape, config = self.inputs.shape(self.num_samples), model.config
        takes = (getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)) if shape else None
        if takes != shape or (shape is None and not hasattr(model, "_get_feat_extract_output_lengths")):
            raise UserError(
                f"--model {self.options.model}: its {sounds.PREPROCESSOR} is not that of this model, a "
                f"{config.model_type!r}: it makes {f'{shape[0]} frames of {shape[1]} bands' if shape else 'waveforms'}"
            )
        if shape is not None:
            return
        num_frames = int(model._get_feat_extract_output_lengths(self.num_samples))
        is_masked = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0) > 0
        least = 1 + config.mask_time_length if is_masked else 1
        if num_frames < least:
            raise UserError(
                f"--seconds: clips of {self.num_samples:,} samples are {num_frames} frames of --model "
                f"{self.options.model}, which needs {least}; set a longer one"
            )

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForAudioClassification

        source = self.options.model
        return pretrained_weights(AutoModelForAudioClassification, source, num_labels=self.num_labels) if source else {}

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        waveforms = [row["waveform"] for row in samples]
        batch = self.inputs(*sounds.clips(waveforms, seeds, num_samples=self.num_samples))
        if self.has_spectrograms:
            batch["input_values"] = sounds.masked(batch["input_values"], seeds, self.options)
        return {**batch, "labels": torch.tensor([int(row["labels"]) for row in samples])}

    def num_tokens(self, batch: Any) -> int:
        return 0  # an attention mask is one of samples here

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_values", "attention_mask") if name in batch}
        outputs = model(**inputs) if self.options.model else model(inputs["input_values"][:, None])
        logits: torch.Tensor = getattr(outputs, "logits", outputs)
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        smoothing = self.options.label_smoothing
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum", label_smoothing=smoothing)

    def metrics(self) -> Mapping[str, Any]:
        self.best_metric = self.options.metrics[0]
        return named_metrics(*self.options.metrics, num_classes=len(self.class_names))

    def export(self, folder: Path, model: Any) -> None:
        if self.options.model:
            save_config(model, folder)
            (folder / sounds.PREPROCESSOR).write_text(json.dumps(self.preprocessor, indent=2))


def sound_net(num_classes: int, *, num_mels: int, width: int, dropout: float) -> nn.Module:
    """Return four stages of a convolution and a max-pool, a mean over time, and a linear layer.

    It takes spectrograms, [n, 1, frames, num_mels]. Bands stay apart until the linear layer: a sound that is higher is
    another sound, one that is later is not.
    """
    channels = [1, *(width << stage for stage in range(NUM_STAGES))]
    stages = [_stage(before, after) for before, after in pairwise(channels)]
    num_features = channels[-1] * math.ceil(num_mels / 2**NUM_STAGES)
    return nn.Sequential(*stages, MeanOverTime(), nn.Dropout(dropout), nn.Linear(num_features, num_classes))


def _stage(num_inputs: int, num_outputs: int) -> nn.Module:
    norm = nn.GroupNorm(math.gcd(8, num_outputs), num_outputs)  # unlike batch norm, of each sound for itself
    convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True))


class MeanOverTime(nn.Module):
    """The mean over frames: [n, channels, frames, bands] -> [n, channels * bands]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.mean(dim=2).flatten(1)


launch(AudioClassifier)
