"""Sounds: options, loading, clips, log-mel spectrograms, masks."""

from shardlaunch.launcher.toolkit.sounds import (
    SoundOptions,
    clips,
    lengths_of,
    load_sounds,
    masked,
    note_lengths,
    require_room_for_masks,
)
from shardlaunch.launcher.toolkit.spectrograms import LogMel

__all__ = [
    "LogMel",
    "SoundOptions",
    "clips",
    "lengths_of",
    "load_sounds",
    "masked",
    "note_lengths",
    "require_room_for_masks",
]
