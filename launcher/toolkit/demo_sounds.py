"""Sounds for demos, made by a formula: voices that sing vowels and glides between two vowels, in noise."""

from typing import Any

import numpy as np

from shardlaunch.launcher.reporting.notes import current

SYLLABLES = ("a", "e", "i", "o", "u", "ai", "ia", "au", "ua", "oi")
_SIZES = {"train": 1200, "eval": 400}
# Frequencies and bandwidths in Hz of the first three resonances of a vocal tract, rounded from those of adult men.
_RESONANCES = {"a": (750, 1200, 2500), "e": (450, 1900, 2500), "i": (280, 2250, 2900)}
_RESONANCES |= {"o": (450, 850, 2400), "u": (310, 750, 2300)}
_BANDWIDTHS = (80.0, 100.0, 140.0)


def syllables(sample_rate: int) -> dict[str, Any]:
    """Return 1,200 sounds of ten syllables as `train`, and 400 of other voices as `eval`: `waveform` and `labels`.

    Waveforms are float32 at `sample_rate` (in Hz), 0.5 to 1 s long. Each has its own pitch, size of the vocal tract,
    length, loudness and noise, which is up to one and a half times as strong as the voice.
    """
    import datasets
    import pyarrow as pa

    info = datasets.DatasetInfo(
        features=datasets.Features(
            {
                "waveform": datasets.List(datasets.Value("float32")),
                "labels": datasets.ClassLabel(names=[*SYLLABLES]),
            }
        )
    )
    splits = {}
    for number, (name, size) in enumerate(_SIZES.items()):
        labels, lengths, samples = _sung(np.random.default_rng(number), size, sample_rate)
        ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        waveforms = pa.ListArray.from_arrays(pa.array(ends), pa.array(samples))
        table = pa.table({"waveform": waveforms, "labels": pa.array(labels)})
        stored = datasets.table.InMemoryTable(table)
        splits[name] = datasets.Dataset(stored, info=info, fingerprint=f"syllables-1-{sample_rate}-{name}")
        current().splits[name] = f"{size:,} rows{', of other voices' if name == 'eval' else ''}"
    current().data.append("syllables that a formula makes, in noise")
    return splits


def _sung(rng: np.random.Generator, count: int, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, lengths and all samples one after another of some syllables."""
    labels = rng.permutation(np.arange(count) % len(SYLLABLES))
    lengths = rng.integers(rate // 2, rate + 1, size=count)
    samples = np.arange(rate, dtype=np.float32)
    course = samples / lengths[:, None].astype(np.float32)  # from 0 to 1, and more when the sound is over

    pitch, glide, start = _uniform(rng, count, (90, 260), (-0.4, 0.4), (0, 1))
    turns = np.floor(np.cumsum(pitch / rate * (1 + glide * (course - 0.5)), axis=1) + start)
    pulses = np.diff(turns, axis=1, prepend=0)  # of the vocal folds
    tract, middle, speed = _uniform(rng, count, (0.85, 1.2), (0.35, 0.65), (8, 20))
    source = np.fft.rfft(pulses)
    first, last = (np.fft.irfft(source * _response(labels, tract, end, rate), n=rate) for end in (0, -1))
    voices = first + (last - first) / (1 + np.exp(speed * (middle - course)))

    is_heard = course < 1
    power = np.einsum("ij,ij->i", voices * is_heard, voices)[:, None] / lengths[:, None]
    noise, level = _uniform(rng, count, (-2.5, 0.4), (-4, -1.5))
    found = voices / np.sqrt(power) + np.exp(noise) * rng.standard_normal(voices.shape, dtype=np.float32)
    return labels, lengths, np.clip(np.exp(level) * found, -1, 1)[is_heard].astype(np.float32)


def _uniform(rng: np.random.Generator, count: int, *ranges: tuple[float, float]) -> list[np.ndarray]:
    """Return one random number per sound of each range, [count, 1]."""
    return [rng.uniform(low, high, size=(count, 1)).astype(np.float32) for low, high in ranges]


def _response(labels: np.ndarray, tract: np.ndarray, end: int, rate: int) -> np.ndarray:
    """Return how strong a vocal tract makes each frequency in the first or last vowel of syllables, float32."""
    square = np.fft.rfftfreq(rate, 1 / rate).astype(np.float32) ** 2
    centers = (np.array([_RESONANCES[name[end]] for name in SYLLABLES])[labels] / tract).astype(np.float32) ** 2
    power = np.ones((len(labels), len(square)), dtype=np.float32)
    for center, bandwidth in zip(centers.T[..., None], _BANDWIDTHS, strict=True):
        power *= center**2 / ((center - square) ** 2 + bandwidth**2 * square)
    return np.sqrt(power)
