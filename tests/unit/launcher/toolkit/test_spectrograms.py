"""Log-mel spectrograms are those of transformers' functions in numpy, on noise, tones and quiet."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ASTFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from shardlaunch import UserError
from shardlaunch.sounds import LogMel

RATE = 16000
SMALL = LogMel(sample_rate=RATE, window=400, hop=160, num_mels=40)


def _waveform() -> np.ndarray:
    """Return a second: two tones and noise in the middle, with an offset, and faint noise around."""
    rng = np.random.default_rng(0)
    seconds = np.arange(RATE) / RATE
    tones = 0.3 * np.sin(2 * np.pi * 440 * seconds) + 0.05 * np.sin(2 * np.pi * 5000 * seconds) + 0.02
    is_middle = (seconds > 0.25) & (seconds < 0.75)
    noise = rng.normal(size=RATE)
    return (np.where(is_middle, tones + 0.1 * noise, 1e-2 * noise)).astype(np.float32)


@pytest.mark.parametrize(
    "how",
    [
        SMALL,
        replace(SMALL, scale="slaney", num_mels=64),
        LogMel(sample_rate=22050, window=1024, hop=256, num_mels=80, scale="slaney", lowest=50.0),
        LogMel(sample_rate=8000, window=200, hop=160, num_mels=20),
    ],
    ids=["htk", "slaney", "a power of two", "8 kHz"],
)
def test_values_are_those_of_transformers(how: LogMel) -> None:
    wave = _waveform()
    filters = mel_filter_bank(
        num_frequency_bins=how.num_bins // 2 + 1,
        num_mel_filters=how.num_mels,
        min_frequency=how.lowest,
        max_frequency=how.sample_rate / 2,
        sampling_rate=how.sample_rate,
        norm="slaney" if how.scale == "slaney" else None,
        mel_scale=how.scale,
    )
    options: dict[str, Any] = {"power": 2.0, "center": False, "mel_filters": filters, "log_mel": "log"}
    window = window_function(how.window, "hann", periodic=True)
    sizes = {"frame_length": how.window, "hop_length": how.hop, "fft_length": how.num_bins}
    expected = spectrogram(wave, window, **sizes, **options, mel_floor=how.floor).T
    (found,) = how(torch.from_numpy(wave)[None])
    assert found.shape == expected.shape == (how.num_frames(RATE), how.num_mels)
    assert np.abs(found.numpy() - expected).max() < 1e-4


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_values_of_kaldi_are_those_of_the_ast() -> None:
    wave = _waveform()
    extractor = ASTFeatureExtractor(max_length=98, do_normalize=False)
    expected = extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"]
    assert (LogMel.of_ast()(torch.from_numpy(wave)[None]) - expected).abs().max() < 1e-4


def test_a_spectrogram_does_not_depend_on_its_batch() -> None:
    waves = torch.from_numpy(np.stack([_waveform(), _waveform()[::-1].copy(), np.zeros(RATE, np.float32)]))
    together = SMALL(waves)
    assert torch.allclose(together[1:2], SMALL(waves[1:2]), atol=1e-6, rtol=0)
    assert together[2].unique().tolist() == pytest.approx([np.log(SMALL.floor)])


def test_a_waveform_shorter_than_a_window_has_no_frame() -> None:
    assert (SMALL.num_frames(399), SMALL.num_frames(400), SMALL.num_frames(560)) == (0, 1, 2)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="128 mel bands are too many for windows of 200 samples at 16000 Hz"):
        replace(SMALL, window=200, num_mels=128)
    with pytest.raises(UserError, match="the hop of 500 samples is longer than the window of 400"):
        replace(SMALL, hop=500)
