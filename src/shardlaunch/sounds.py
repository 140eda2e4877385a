"""Sounds: options, loading, clips, log-mel spectrograms, masks."""

from shardlaunch.launcher.toolkit.spectrograms import LogMel

__all__ = ["LogMel"]
