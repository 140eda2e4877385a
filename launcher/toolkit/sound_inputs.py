"""What nets take of clips: log-mel spectrograms or waveforms, normalized as a pretrained model expects them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from shardlaunch.errors import UserError
from shardlaunch.launcher.toolkit.pretrained import from_source
from shardlaunch.launcher.toolkit.spectrograms import LogMel

PREPROCESSOR = "preprocessor_config.json"
_RANGE = 8 * math.log(10)  # of a spectrogram from scratch: 80 dB below its loudest place, as a natural logarithm
_EPSILON = 1e-7  # of the variance of waveforms, as transformers has it


class Inputs(Protocol):
    """What a net takes of clips."""

    @property
    def sample_rate(self) -> int:
        """Return the sample rate of the clips in Hz."""

    @property
    def longest(self) -> int:
        """Return the most samples of a clip; 0: any."""

    def shape(self, num_samples: int) -> tuple[int, int] | None:
        """Return frames and bands of the spectrogram of a clip, no frames if it is too short; None: no spectrogram."""

    def __call__(self, clips: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `input_values`, and an `attention_mask` if the model expects one, of [n, samples] and true lengths."""


@dataclass(frozen=True)
class Spectrograms:
    """Log-mel spectrograms of at most 80 dB, each shifted and scaled to the mean 0 and the deviation 1."""

    log_mel: LogMel
    longest: int = 0

    @property
    def sample_rate(self) -> int:
        return self.log_mel.sample_rate

    def shape(self, num_samples: int) -> tuple[int, int]:
        return self.log_mel.num_frames(num_samples), self.log_mel.num_mels

    def __call__(self, clips: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.log_mel(clips)
        found = found.maximum(found.amax(dim=(1, 2), keepdim=True) - _RANGE)
        found = found - found.mean(dim=(1, 2), keepdim=True)
        return {"input_values": found / (found.std(dim=(1, 2), keepdim=True, correction=0) + _EPSILON)}


@dataclass(frozen=True)
class AstSpectrograms:
    """Spectrograms as the ASTFeatureExtractor of transformers makes them, filled up to a number of frames."""

    log_mel: LogMel
    num_frames: int
    mean: float
    std: float

    @property
    def sample_rate(self) -> int:
        return self.log_mel.sample_rate

    @property
    def longest(self) -> int:
        return self.log_mel.window + (self.num_frames - 1) * self.log_mel.hop

    def shape(self, num_samples: int) -> tuple[int, int]:
        return self.num_frames if self.log_mel.num_frames(num_samples) else 0, self.log_mel.num_mels

    def __call__(self, clips: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.log_mel(clips)
        whole = torch.tensor([self.log_mel.num_frames(int(length)) for length in lengths])
        found = found * (torch.arange(found.shape[1]) < whole[:, None])[..., None]
        found = F.pad(found, (0, 0, 0, self.num_frames - found.shape[1]))
        return {"input_values": (found - self.mean) / (2 * self.std)}


@dataclass(frozen=True)
class Waveforms:
    """Waveforms as the Wav2Vec2FeatureExtractor of transformers makes them."""

    sample_rate: int
    is_normalized: bool
    has_mask: bool
    longest: int = 0

    def shape(self, num_samples: int) -> None:
        return None

    def __call__(self, clips: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        is_sound = torch.arange(clips.shape[1]) < lengths[:, None]
        if self.is_normalized:
            mean = clips.sum(dim=1, keepdim=True) / lengths[:, None]
            centered = (clips - mean) * is_sound
            clips = centered / (centered.square().sum(dim=1, keepdim=True) / lengths[:, None] + _EPSILON).sqrt()
        found = {"input_values": clips}
        return {**found, "attention_mask": is_sound.long()} if self.has_mask else found


def preprocessor(source: str) -> dict[str, Any]:
    """Return the preprocessor's configuration of a pretrained model. Raises UserError where there is none.

    Where it does not name its class, as older ones, that is the one of the model's type.
    """
    from transformers import AutoConfig
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    try:
        found, _ = FeatureExtractionMixin.get_feature_extractor_dict(source)
    except OSError as error:
        raise UserError(
            f"--model {source}: has no {PREPROCESSOR}, which says what the model takes of a sound; add it to the folder"
        ) from error
    if "feature_extractor_type" in found:
        return dict(found)
    model_type = from_source(AutoConfig, source).model_type
    return {**found, "feature_extractor_type": FEATURE_EXTRACTOR_MAPPING_NAMES.get(model_type)}


def expected_inputs(found: Mapping[str, Any], source: str) -> Inputs:
    """Return what a pretrained model takes, as its preprocessor's configuration says.

    Raises UserError for a preprocessor other than those of Audio Spectrogram Transformers and of models of waveforms
    (wav2vec 2.0, HuBERT, WavLM, ...), and for settings that are not supported.
    """
    kind = found.get("feature_extractor_type")
    rate = int(found.get("sampling_rate", 16000))
    if kind == "Wav2Vec2FeatureExtractor":
        if found.get("feature_size", 1) != 1 or found.get("padding_value", 0) or found.get("padding_side") == "left":
            raise UserError(f"--model {source}: its {PREPROCESSOR} pads otherwise than with zeros at the end")
        return Waveforms(rate, bool(found.get("do_normalize", True)), bool(found.get("return_attention_mask", False)))
    if kind != "ASTFeatureExtractor":
        raise UserError(
            f"--model {source}: the feature extractor {kind} is not supported; choose a model with the "
            f"ASTFeatureExtractor or the Wav2Vec2FeatureExtractor"
        )
    log_mel = LogMel.of_ast(int(found.get("num_mel_bins", 128)))
    if rate != log_mel.sample_rate:
        raise UserError(f"--model {source}: a sample rate of {rate} Hz; its features are defined at 16000 Hz only")
    mean, std = float(found.get("mean", -4.2677393)), float(found.get("std", 4.5689974))
    if not found.get("do_normalize", True):
        mean, std = 0.0, 0.5
    return AstSpectrograms(log_mel, int(found.get("max_length", 1024)), mean, std)
