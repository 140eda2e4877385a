"""Log-mel spectrograms in torch."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from shardlaunch.errors import UserError

MelScale = Literal["htk", "slaney"]
_PREEMPHASIS = 0.97


@dataclass(frozen=True, kw_only=True)
class LogMel:
    """How waveforms become log-mel spectrograms. Raises UserError for sizes that cannot be."""

    sample_rate: int
    """In Hz."""
    window: int
    """Samples of a frame, under a Hann window. The first frame begins with the first sample; none is padded."""
    hop: int
    """Samples from the start of a frame to that of the next one."""
    num_mels: int
    scale: MelScale = "htk"
    """htk: triangles of height 1 on the scale of HTK; slaney: of equal area on that of Slaney, as librosa has them."""
    lowest: float = 0.0
    """Frequency in Hz at which the first triangle begins; the last one ends at half the sample rate."""
    is_kaldi: bool = False
    """As Kaldi has it: each frame without its mean and with preemphasis, triangles that are straight in mels."""
    floor: float = 1e-10
    """Least power, of which the logarithm is taken."""

    def __post_init__(self) -> None:
        if self.hop > self.window:
            raise UserError(f"the hop of {self.hop} samples is longer than the window of {self.window}; shorten it")
        empty = int((_filters(self) == 0).all(dim=0).sum())
        if empty and not self.is_kaldi:  # pretrained models may expect some
            raise UserError(
                f"{self.num_mels} mel bands are too many for windows of {self.window} samples at {self.sample_rate} "
                f"Hz: {empty} would be empty; choose fewer, or a longer window"
            )

    @staticmethod
    def of_ast(num_mels: int = 128) -> "LogMel":
        """Return the features of Audio Spectrogram Transformers (Gong, Chung and Glass 2021), which are Kaldi's."""
        return LogMel(
            sample_rate=16000,
            window=400,
            hop=160,
            num_mels=num_mels,
            lowest=20.0,
            is_kaldi=True,
            floor=float(np.finfo(np.float32).eps),
        )

    @property
    def num_bins(self) -> int:
        """Return the length of the Fourier transform: the window's, up to the next power of two."""
        return 1 << (self.window - 1).bit_length()

    def num_frames(self, num_samples: int) -> int:
        """Return the number of whole frames of a waveform."""
        return max(0, 1 + (num_samples - self.window) // self.hop)

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Return the natural logarithm of the power in each band: [n, samples] -> [n, frames, mels], float32."""
        # In float32, weak bands beside strong ones would lose digits.
        frames = waveforms.double().unfold(-1, self.window, self.hop)
        if self.is_kaldi:
            frames = frames - frames.mean(dim=-1, keepdim=True)
            frames = frames - _PREEMPHASIS * frames.roll(1, dims=-1)  # of the first sample, the window leaves nothing
        window = torch.hann_window(self.window, periodic=not self.is_kaldi, dtype=torch.float64)
        spectrum = torch.fft.rfft(F.pad(frames * window, (0, self.num_bins - self.window)))
        power = spectrum.real**2 + spectrum.imag**2
        bands: torch.Tensor = power @ _filters(self)
        return bands.clamp(min=self.floor).log().float()


@lru_cache(maxsize=8)
def _filters(how: LogMel) -> torch.Tensor:
    """Return the weights of frequencies in bands, [frequencies, mels] in float64."""
    highest = how.sample_rate / 2
    frequencies = np.linspace(0, highest, how.num_bins // 2 + 1)
    edges = np.linspace(_mels(how.lowest, how.scale), _mels(highest, how.scale), how.num_mels + 2)
    if how.is_kaldi:
        frequencies = _mels(frequencies, how.scale)
    else:
        edges = _hertz(edges, how.scale)
    rising = (frequencies[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies[:, None]) / np.diff(edges)[1:]
    weights = np.maximum(0, np.minimum(rising, falling))
    if how.scale == "slaney":
        weights *= 2 / (edges[2:] - edges[:-2])
    return torch.from_numpy(weights)


# Slaney's scale (Auditory Toolbox, 1998) is linear up to 1,000 Hz, which are 15 mels, and logarithmic above.
_LINEAR_HZ, _LINEAR_MELS, _LOG_STEP = 1000.0, 15.0, np.log(6.4) / 27


def _mels(hertz: float | np.ndarray, scale: MelScale) -> np.ndarray:
    values = np.asarray(hertz, dtype=np.float64)
    if scale == "htk":
        return np.asarray(2595 * np.log10(1 + values / 700))
    above = _LINEAR_MELS + np.log(np.maximum(values, _LINEAR_HZ) / _LINEAR_HZ) / _LOG_STEP
    return np.where(values < _LINEAR_HZ, values * _LINEAR_MELS / _LINEAR_HZ, above)


def _hertz(mels: np.ndarray, scale: MelScale) -> np.ndarray:
    if scale == "htk":
        return np.asarray(700 * (10 ** (mels / 2595) - 1))
    above = _LINEAR_HZ * np.exp(_LOG_STEP * (np.maximum(mels, _LINEAR_MELS) - _LINEAR_MELS))
    return np.where(mels < _LINEAR_MELS, mels * _LINEAR_HZ / _LINEAR_MELS, above)
