"""Sounds: decoded once into waveforms of one sample rate, then cut into clips of one length, and masked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shardlaunch.errors import UserError
from shardlaunch.launcher.options import flag, option
from shardlaunch.launcher.reporting.notes import counted, current
from shardlaunch.launcher.toolkit import demo_data, demo_sounds
from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.columns import class_names, select_columns
from shardlaunch.launcher.toolkit.datasets import load_splits
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.files import FileOptions
from shardlaunch.launcher.toolkit.other_data import numbered, other_rows, other_source
from shardlaunch.launcher.toolkit.stored_files import content_of_files, name_of_row, note_conversions
from shardlaunch.launcher.toolkit.waveforms import WORDS, decoded

_COLUMNS = ("audio", "file", "path")  # of sounds, as hub data sets call them: the first one that is there
_DECODED_AT_A_TIME = 64  # rows, for memory: a sound may have minutes
_CROP, _TIME, _FREQUENCY = range(3)  # what is drawn from a sample's seed


@dataclass(kw_only=True)
class SoundOptions(FileOptions):
    """Options of every recipe that reads sounds."""

    audio_column: str = option("", mark="free", group="sound")
    """Column of the sounds: files, or their paths (default: audio, file or path, the first that is there)."""
    label_column: str = option("label", mark="free", group="sound")
    """Column of the classes: names or whole numbers."""
    time_mask: int = option(0, group="sound", minimum=0)
    """Blank a random span of up to N frames of each training spectrogram (SpecAugment; Park et al. 2019)."""
    frequency_mask: int = option(0, group="sound", minimum=0)
    """Blank a random span of up to N bands of each training spectrogram."""


def load_sounds(options: SoundOptions, *, sample_rate: int) -> tuple[dict[str, Any], list[str]]:
    """Return the data sets `train` and `eval` of --data (or the demo's), and the names of the classes.

    Columns: `waveform`, float32 within -1..1 of any length per row, and `labels`. Waveforms are cached on disk. The
    start says how many were resampled to `sample_rate` (in Hz), and of how many the channels were averaged. Raises
    UserError, with the row, for what is no sound.
    """
    source = options.data
    if source == demo_data.DEMO:
        unused = [flag(name) for name in ("audio_column", "label_column") if name in options.explicitly_set]
        if unused:
            raise UserError(f"{', '.join(unused)}: has no effect with --data demo; remove it")
        return _demo_syllables(options, sample_rate=sample_rate)
    splits = load_splits(source, seed=options.seed, columns=_columns(options), options=options)
    splits, column = _selected(splits, options, source)
    splits, classes = class_names(splits, source=source, called=options.label_column)
    where = f"--data {source}: column {column!r} of the "
    return {
        name: _decoded(split, sample_rate=sample_rate, where=f"{where}{name} data") for name, split in splits.items()
    }, classes


def _selected(splits: Mapping[str, Any], options: SoundOptions, source: str) -> tuple[dict[str, Any], str]:
    """Return the splits with the columns `audio` and `label`, and what the first is called in the data."""
    names = splits["train"].column_names
    column = options.audio_column or next((name for name in _COLUMNS if name in names), _COLUMNS[0])
    columns = {"audio": column, "label": options.label_column, **options.groups()}
    return select_columns(splits, columns, source=source), column


def _columns(options: SoundOptions) -> dict[str, ColumnKind]:
    """Return the columns that may be used, with their kinds."""
    sounds = (options.audio_column,) if options.audio_column else _COLUMNS
    return {**dict.fromkeys(sounds, "any"), options.label_column: "label"}


def _demo_syllables(options: SoundOptions, *, sample_rate: int) -> tuple[dict[str, Any], list[str]]:
    """Return the demo's sounds, or in an evaluation on other data these as `eval`, and the names of the classes."""
    classes = [*demo_sounds.SYLLABLES]
    splits = demo_sounds.syllables(sample_rate)
    rows = other_rows(columns=_columns(options), options=options)
    if rows is not None:
        source = other_source()
        rows = numbered(rows, options.label_column, classes, source=source)
        selected, column = _selected({"train": rows}, options, source)
        where = f"--data {source}: column {column!r}"
        splits["eval"] = _decoded(selected["train"], sample_rate=sample_rate, where=where)
    return {name: split.with_format("numpy") for name, split in splits.items()}, classes


def _decoded(split: Any, *, sample_rate: int, where: str) -> Any:
    import datasets

    def waveforms(sounds: list[Any], rows: list[int]) -> dict[str, Any]:
        found, done = [], []
        for row, stored in zip(rows, sounds, strict=True):
            try:
                waveform, how = decoded(stored, sample_rate=sample_rate)
            except Exception as error:  # decoders raise many kinds of errors
                raise UserError(f"{where}: {name_of_row(row, stored)} is not a readable sound ({error})") from error
            found.append(waveform)
            done.append(how)
        return {"waveform": found, "done": done}

    try:
        split = split.cast_column("audio", datasets.Audio(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{where} must hold sounds, not {split.features['audio']}") from error
    kept = {name: feature for name, feature in split.features.items() if name != "audio"}
    made = {"waveform": datasets.LargeList(datasets.Value("float32")), "done": datasets.Value("uint8")}
    found = derived(
        split,
        waveforms,
        key=("waveforms", 1, sample_rate, *content_of_files(split, "audio")),
        doing="decoding sounds",
        input_columns=["audio"],
        with_indices=True,
        remove_columns=["audio"],
        features=datasets.Features({**kept, **made}),
        batch_size=_DECODED_AT_A_TIME,
        writer_batch_size=_DECODED_AT_A_TIME,
    )
    note_conversions(np.asarray(found.with_format("numpy")["done"][:]), WORDS, noun="sound", where=where)
    return found.remove_columns("done").rename_column("label", "labels").with_format("numpy")


def lengths_of(split: Any) -> np.ndarray:
    """Return the number of samples of each waveform of a data set (int64)."""
    stored = split.with_format("arrow", columns=["waveform"])[:]["waveform"]
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in stored.chunks]).astype(np.int64)


def note_lengths(splits: Mapping[str, Any], *, num_samples: int, sample_rate: int) -> None:
    """Note how many sounds are longer or shorter than the clips, for the start of the run."""
    for name, split in splits.items():
        lengths = lengths_of(split)
        for count, how in (((lengths > num_samples).sum(), "longer"), ((lengths < num_samples).sum(), "shorter")):
            if count:
                what = "cropped" if how == "longer" else "padded"
                current().remarks.append(
                    f"{counted(int(count), 'sound')} of the {name} data, {how} than {num_samples / sample_rate:.4g} s, "
                    f"{what}"
                )


def clips(
    waveforms: Sequence[np.ndarray], seeds: np.ndarray | None, *, num_samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return waveforms as clips, [n, num_samples], and how many samples of each are not padding.

    Longer ones are cropped, at random by their seeds or, without seeds, in the middle; shorter ones have zeros after
    their end.
    """
    found = np.zeros((len(waveforms), num_samples), dtype=np.float32)
    lengths = [min(len(waveform), num_samples) for waveform in waveforms]
    for row, waveform in enumerate(waveforms):
        spare = max(0, len(waveform) - num_samples)
        first = spare // 2 if seeds is None else _drawn(seeds[row], _CROP).integers(spare + 1)
        found[row, : lengths[row]] = waveform[first : first + num_samples]
    return torch.from_numpy(found), torch.tensor(lengths)


def masked(spectrograms: torch.Tensor, seeds: np.ndarray | None, options: SoundOptions) -> torch.Tensor:
    """Return spectrograms ([n, frames, bands]) with spans of zeros, each by its own seed; unchanged without seeds."""
    masks = ((1, _TIME, options.time_mask), (2, _FREQUENCY, options.frequency_mask))
    if seeds is None or not any(longest for _, _, longest in masks):
        return spectrograms
    found = spectrograms.clone()
    for axis, purpose, longest in masks:
        size = found.shape[axis]
        for row, seed in enumerate(seeds if longest else ()):
            rng = _drawn(seed, purpose)
            width = rng.integers(longest + 1)
            found[row].narrow(axis - 1, int(rng.integers(size - width + 1)), int(width)).zero_()
    return found


def require_room_for_masks(options: SoundOptions, *, num_frames: int, num_mels: int) -> None:
    """Raise UserError for masks that may cover whole spectrograms."""
    for name, most, what in (("time_mask", num_frames, "frames"), ("frequency_mask", num_mels, "bands")):
        value = getattr(options, name)
        if value >= most:
            raise UserError(f"{flag(name)} {value}: must be less than the spectrograms' {what}, {most}")


def _drawn(seed: int, purpose: int) -> np.random.Generator:
    """Return random numbers for one purpose of a sample's seed."""
    return np.random.default_rng((int(seed), purpose))
