"""What the audio classifier makes of sounds and of a pretrained model's expectations, and what it refuses."""

import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor

from shardlaunch.checkpoints.layout import step_dir_name
from shardlaunch.launcher.command_line.parsing import parse_options
from shardlaunch.recipes.audio_classifier import AudioClassifier, AudioClassifierOptions, sound_net
from tests.recipes import losses, run_quietly, run_well
from tests.sound_models import save_small_ast, save_small_wav2vec2

ARGV = ("--preset", "demo", "--tracker", "none", "--threads-per-rank", "1")
RATE = 16000
PREPROCESSORS = {
    "short": {"num_mel_bins": 16, "max_length": 48},
    "raw": {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
    "other": {"feature_extractor_type": "WhisperFeatureExtractor"},
}


def _recipe(*argv: str) -> AudioClassifier:
    options = parse_options(AudioClassifierOptions, AudioClassifier.presets, argv, program="", description="")
    return AudioClassifier(options)


def _write(folder: Path, *lengths: int, classes: str = "ab") -> None:
    """Write sounds of some lengths in samples for each class, of random noise."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for row, length in enumerate(lengths):
            noise = np.random.default_rng((number, row)).integers(-9000, 9000, size=length, dtype=np.int16)
            with wave.open(str(folder / name / f"{row}.wav"), "wb") as file:
                file.setparams((1, 2, RATE, 0, "NONE", ""))
                file.writeframes(noise.tobytes())


def save_masked(folder: Path) -> None:
    save_small_wav2vec2(folder, is_masked=True)


@pytest.mark.parametrize("save", [save_small_ast, save_small_wav2vec2, save_masked])
@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_pretrained_models_get_what_their_extractor_makes(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / "model")
    _write(tmp_path / "data" / "train", 9000, 4000, 5000)
    recipe = _recipe("--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--seconds", "0.5")
    rows = [*recipe.datasets()["train"]]
    batch = recipe.collate(rows, None)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    middle = [row["waveform"][500:8500] if len(row["waveform"]) == 9000 else row["waveform"] for row in rows]
    made = [extractor(one, sampling_rate=RATE, return_tensors="pt")["input_values"][0] for one in middle]
    expected = {"input_values": torch.nn.utils.rnn.pad_sequence(made, batch_first=True)}
    if save is save_masked:
        how = {"padding": "max_length", "max_length": 8000, "return_tensors": "pt"}
        expected = extractor(middle, sampling_rate=RATE, **how)
    assert batch.keys() == {*expected, "labels"}
    for name, values in expected.items():
        assert (batch[name] - values).abs().max() < 1e-4, name


def test_the_checkpoint_has_the_classes_and_the_extractor(tmp_path: Path) -> None:
    save_small_ast(tmp_path / "model")
    argv = [*ARGV, "--model", str(tmp_path / "model"), "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    status, output = run_quietly(AudioClassifier, argv)
    assert status == 0, output
    folder = tmp_path / "run" / "checkpoints" / step_dir_name(1)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert (extractor.mean, extractor.std, extractor.max_length) == (-4.0, 4.5, 56)
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert names["5"] == "ai"


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    argv = [*ARGV, "--max-steps", "2", "--width", "4", "--log-every", "1", "--seconds", "0.4"]
    found = []
    for workers in ("0", "2"):
        run_well(AudioClassifier, [*argv, "--num-workers", workers, "--output-dir", str(tmp_path / workers)])
        found.append(losses(tmp_path / workers))
    assert found[0] == found[1]


def test_clips_are_as_long_as_the_longest_sound_or_ten_seconds(tmp_path: Path) -> None:
    _write(tmp_path / "train", 3000, 4000)
    argv = ("--data", str(tmp_path), "--num-mels", "16")
    recipe = _recipe(*argv)
    recipe.datasets()
    assert recipe.num_samples == 4000
    _write(tmp_path / "train", 11 * RATE, classes="cd")
    recipe = _recipe(*argv)
    recipe.datasets()
    assert recipe.num_samples == 10 * RATE


def test_loudness_changes_nothing_and_padding_is_not_louder_than_the_floor() -> None:
    recipe = _recipe(*ARGV)
    recipe.datasets()
    clip = torch.from_numpy(np.random.default_rng(0).normal(size=8000).astype(np.float32))
    clips = torch.stack((clip, clip / 2**14, clip * (torch.arange(8000) < 4000)))
    loud, quiet, padded = recipe.inputs(clips, torch.tensor([8000, 8000, 4000]))["input_values"]
    assert (loud - quiet).abs().max() < 1e-4
    assert loud.mean().abs() < 1e-5
    assert loud.std(correction=0) == pytest.approx(1, abs=1e-5)
    assert torch.equal(padded[-10:].unique(), padded.min()[None])


def test_the_net_takes_spectrograms_of_any_size() -> None:
    net = sound_net(3, num_mels=17, width=4, dropout=0.0)
    for frames in (1, 5, 64):
        assert net(torch.randn(2, 1, frames, 17)).shape == (2, 3)
    inputs = torch.randn(2, 1, 64, 17)
    assert torch.allclose(net(inputs)[1:], net(inputs[1:]), atol=1e-6), "a sound does not depend on others"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--audio-column", "sound"), "--audio-column: has no effect with --data demo; remove it"),
        (("--seconds", "0.01"), "clips of 80 samples are shorter than a frame; set a longer --seconds"),
        (("--time-mask", "49"), "--time-mask 49: must be less than the spectrograms' frames, 49"),
        (("--num-mels", "128"), "128 mel bands are too many for windows of 200 samples at 8000 Hz"),
        (("--hop-ms", "30"), "the hop of 240 samples is longer than the window of 200; shorten it"),
        (("--metrics", "f2"), "unknown metric 'f2'"),
        (("--model", "{ast}", "--num-mels", "32", "--width", "8"), "--width, --num-mels: only for a net from scratch"),
        (("--model", "{ast}", "--sample-rate", "22050"), "--sample-rate 22050: --model {ast} expects 16000; remove it"),
        (("--model", "{ast}", "--seconds", "2"), "--seconds 2: --model {ast} takes 0.575 at most; lower it"),
        (("--model", "{ast}", "--seconds", "0.02"), "clips of 320 samples are shorter than a frame; set a longer"),
        (("--model", "{wav}", "--time-mask", "9"), "--time-mask: only for spectrograms, but --model {wav} takes wave"),
        (("--model", "{wav}", "--seconds", "0.1"), "--seconds: clips of 1,600 samples are 5 frames of --model {wav}"),
        (("--model", "{bare}"), "has no preprocessor_config.json, which says what the model takes of a sound"),
        (("--model", "{short}"), "its preprocessor_config.json is not that of this model, a 'audio-spectrogram-transf"),
        (("--model", "{raw}"), "is not that of this model, a 'audio-spectrogram-transformer': it makes waveforms"),
        (("--model", "{other}"), "the feature extractor WhisperFeatureExtractor is not supported; choose a model"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("ast", "wav", "bare", *PREPROCESSORS)}
    used = {name for name in folders if f"{{{name}}}" in words}
    for name in used:
        (save_small_wav2vec2 if name == "wav" else save_small_ast)(Path(folders[name]))
    if "bare" in used:
        (tmp_path / "bare" / "preprocessor_config.json").unlink()
    for name in used & PREPROCESSORS.keys():
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[name]))
    given = [word.format(**folders) for word in words]
    status, output = run_quietly(
        AudioClassifier, [*ARGV, "--max-steps", "1", *given, "--output-dir", str(tmp_path / "r")]
    )
    assert status == 2, output
    assert message.format(**folders) in " ".join(output.split())
