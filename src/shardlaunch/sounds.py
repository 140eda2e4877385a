"""Sounds: options, loading, clips, log-mel spectrograms, masks, what pretrained models take."""

from shardlaunch.launcher.toolkit.sound_inputs import (
    PREPROCESSOR,
    Inputs,
    Spectrograms,
    expected_inputs,
    preprocessor,
)
from shardlaunch.launcher.toolkit.sounds import (
    SoundOptions,
    clips,
    lengths_of,
    load_sounds,
    masked,
    note_lengths,
    require_room_for_masks,
)
from shardlaunch.launcher.toolkit.spectrograms import LogMel, MelScale

__all__ = [
    "PREPROCESSOR",
    "Inputs",
    "LogMel",
    "MelScale",
    "SoundOptions",
    "Spectrograms",
    "clips",
    "expected_inputs",
    "lengths_of",
    "load_sounds",
    "masked",
    "note_lengths",
    "preprocessor",
    "require_room_for_masks",
]
