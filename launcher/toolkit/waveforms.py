"""One stored sound as a waveform: read, its channels averaged, resampled, or refused."""

import io
import math
import wave
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shardlaunch.launcher.toolkit.stored_files import stored_bytes

# What was done to a sound, as bits, and the words for it.
AVERAGED, RESAMPLED = 1, 2
WORDS = {AVERAGED: "of several channels averaged", RESAMPLED: "of other sample rates resampled"}
_PCM, _EXTENSIBLE = b"\x01\x00", b"\xfe\xff"  # formats of WAV files; many of 24 bits have the second
# The filter of a change of sample rate: a sinc below a Kaiser window (Kaiser and Schafer 1980).
_ZERO_CROSSINGS, _BETA = 64, 9.0
_CUTOFF = 0.95  # of the lower of both Nyquist frequencies, so that what lies above it is gone
_CHUNK = 1 << 14  # samples that are resampled at a time, for memory


def decoded(stored: Mapping[str, Any] | None, *, sample_rate: int) -> tuple[np.ndarray, int]:
    """Return a stored sound (`bytes`, or a `path`) as float32 samples within -1..1, [length], and what was done.

    Raises many kinds of errors for what is no sound.
    """
    channels, rate = _read(stored_bytes(stored))
    if not channels.size:
        raise ValueError("it has no samples")
    if not np.isfinite(channels).all():
        raise ValueError("it has samples that are no numbers")
    waveform, done = channels[:, 0], 0
    if channels.shape[1] > 1:
        waveform, done = channels.mean(axis=1), AVERAGED
    if rate != sample_rate:
        waveform, done = resampled(torch.from_numpy(waveform), rate, sample_rate).numpy(), done | RESAMPLED
    return waveform, done


def _read(content: bytes) -> tuple[np.ndarray, int]:
    """Return a file's samples, float32 of shape [length, channels], and its sample rate."""
    if content[12:16] == b"fmt " and content[20:22] == _EXTENSIBLE and content[44:46] == _PCM:
        content = content[:20] + _PCM + content[22:]  # Python 3.11 does not know the other name of the same samples
    try:
        with wave.open(io.BytesIO(content)) as file:
            found = file.getparams()
            data = file.readframes(found.nframes)
    except (wave.Error, EOFError) as error:
        return _read_by_soundfile(content, error)
    whole = found.nframes * found.nchannels * found.sampwidth
    if len(data) != whole:
        raise ValueError(f"it is cut off: {len(data):,} of {whole:,} bytes of samples")
    return _samples(data, found.sampwidth).reshape(-1, found.nchannels), found.framerate


def _samples(data: bytes, width: int) -> np.ndarray:
    """Return PCM samples of 1 to 4 bytes as float32 within -1..1."""
    if width == 1:  # the only ones without a sign
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    padded = np.zeros((len(data) // width, 4), np.uint8)
    padded[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return (padded.view("<i4")[:, 0] / 2**31).astype(np.float32)


def _read_by_soundfile(content: bytes, error: Exception) -> tuple[np.ndarray, int]:
    if find_spec("soundfile") is None:
        raise ValueError(
            f"{str(error) or 'it ends too early'}; what is no WAV file of whole numbers needs soundfile: pip install "
            f'"shardlaunch[audio]"'
        ) from error
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return samples, rate


def resampled(waveform: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """Return a waveform ([length], float32) of one sample rate at another one, [ceil(length * wanted / rate)].

    Each sample is a sum of those around it, weighted by a windowed sinc (Smith and Gossett 1984); beyond both ends is
    silence. What the lower rate cannot hold is filtered out.
    """
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    weights = _weights(up, down)
    reach = weights.shape[1] // 2
    around = F.pad(waveform, (reach, reach)).unfold(0, weights.shape[1], 1)
    found = torch.empty(-(-len(waveform) * up // down))
    for first in range(min(up, len(found))):  # of samples that are as far from those of the waveform
        place = first * down  # in the waveform, times `up`
        rows = around[place // up :: down].split(_CHUNK)
        found[first::up] = torch.cat([part @ weights[place % up] for part in rows])[: len(found[first::up])]
    return found


@lru_cache(maxsize=4)
def _weights(up: int, down: int) -> torch.Tensor:
    """Return the weights of the samples around a place, [up, samples]: a place is so many parts after its sample."""
    cutoff = _CUTOFF * min(1.0, up / down)
    reach = _ZERO_CROSSINGS / cutoff
    samples = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    distance = samples - np.arange(up)[:, None] / up
    inside = np.maximum(0, 1 - (distance / reach) ** 2)
    window = np.where(np.abs(distance) < reach, np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA), 0)
    return torch.from_numpy(cutoff * np.sinc(cutoff * distance) * window).float()
