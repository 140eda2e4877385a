"""Sounds: reading, invalid files, other sample rates and channels, clips and masks by the sample's own seed."""

import io
import struct
import wave
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from scipy.signal import resample_poly

from shardlaunch import UserError, sounds
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.seeding import sample_seeds
from shardlaunch.launcher.toolkit import waveforms
from shardlaunch.launcher.toolkit.demo_sounds import SYLLABLES, syllables
from shardlaunch.sounds import SoundOptions

RATE = 8000


def _noise(number: int, length: int = 500, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(number).uniform(-0.9, 0.9, size=(length, channels))


def _wav(samples: np.ndarray, *, width: int = 2, rate: int = RATE) -> bytes:
    """Return the bytes of a WAV file of samples within -1..1, [length, channels]."""
    whole = np.rint(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    whole += 128 if width == 1 else 0
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(whole.reshape(-1, 1).view(np.uint8)[:, :width].tobytes())
    return content.getvalue()


def _options(folder: Path, contents: Sequence[bytes | None], **options: object) -> SoundOptions:
    """Write files as training and test data, as the hub has them, and return options for them."""
    for name in ("train", "test"):
        stored = [None if content is None else {"bytes": content, "path": None} for content in contents]
        table = {"audio": stored, "label": [number % 2 for number in range(len(stored))]}
        pd.DataFrame(table).to_parquet(folder / f"{name}.parquet")
    return SoundOptions(data=str(folder), **options)  # type: ignore[arg-type]


def _loaded(options: SoundOptions) -> tuple[list[np.ndarray], list[str]]:
    """Return the training waveforms, and what was said of them."""
    with collected() as notes:
        splits, _ = sounds.load_sounds(options, sample_rate=RATE)
    return [row["waveform"] for row in splits["train"]], notes.remarks


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_all_widths_are_read(tmp_path: Path, width: int) -> None:
    expected = [_noise(0), _noise(1, 77)]
    found, remarks = _loaded(_options(tmp_path, [_wav(samples, width=width) for samples in expected]))
    assert not remarks
    for samples, waveform in zip(expected, found, strict=True):
        assert waveform.dtype == np.float32
        assert np.abs(waveform - samples[:, 0]).max() < 2.0 ** -(8 * width - 2) + 1e-7


def test_the_extensible_format_is_read(tmp_path: Path) -> None:
    """As ffmpeg and sox write 24 bits."""
    plain = _wav(_noise(0), width=3)
    guid = b"\x01\x00\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    start = plain[:4] + struct.pack("<I", len(plain) + 16) + plain[8:16]
    header = start + struct.pack("<IH", 40, 0xFFFE) + plain[22:36] + struct.pack("<HHI", 22, 24, 4) + guid
    (found, _), _ = _loaded(_options(tmp_path, [header + plain[36:], plain]))
    assert np.abs(found - _noise(0)[:, 0]).max() < 1e-6


def test_channels_are_averaged_and_rates_changed_and_said(tmp_path: Path) -> None:
    stereo, fast = _noise(0, channels=2), _noise(1, 1000)
    found, remarks = _loaded(_options(tmp_path, [_wav(stereo), _wav(fast, rate=2 * RATE), _wav(_noise(2))]))
    assert np.abs(found[0] - stereo.mean(axis=1)).max() < 1e-4
    assert [len(waveform) for waveform in found] == [500, 500, 500]
    assert "1 sound of the train data of several channels averaged" in remarks
    assert "1 sound of the train data of other sample rates resampled" in remarks


@pytest.mark.parametrize(
    ("rate", "wanted"), [(44100, 16000), (8000, 16000), (48000, 16000), (16000, 11025), (997, 400)]
)
def test_resampled_tones_stay_and_others_are_gone(rate: int, wanted: int) -> None:
    tones = (0.01 * wanted, 0.2 * min(rate, wanted), 0.45 * min(rate, wanted))
    before, after = (np.arange(one) / one for one in (rate, wanted))
    tone = [sum(np.sin(2 * np.pi * tone * times + tone) for tone in tones) for times in (before, after)]
    found = waveforms.resampled(torch.from_numpy(np.float32(tone[0])), rate, wanted).numpy()
    assert len(found) == wanted
    inner = slice(wanted // 4, -wanted // 4)  # beyond the ends is silence
    assert np.abs(found - tone[1])[inner].max() < 1e-4
    if rate > wanted:
        high = np.float32(np.sin(2 * np.pi * 0.51 * wanted * before))
        assert np.abs(waveforms.resampled(torch.from_numpy(high), rate, wanted).numpy()[inner]).max() < 1e-3


@pytest.mark.parametrize(("rate", "wanted"), [(3, 2), (2, 3), (441, 160), (1, 2)])
@pytest.mark.parametrize("length", [1, 7, 1000])
def test_resampling_is_that_of_scipy_with_the_same_filter(rate: int, wanted: int, length: int) -> None:
    noise = np.float32(_noise(3, length)[:, 0])
    weights = waveforms._weights(wanted, rate).double().numpy()
    reach = weights.shape[1] // 2
    center = (reach + 1) * wanted
    whole = np.zeros(2 * center + 1)  # the filter at the rate of which both are parts
    for phase in range(wanted):
        whole[center + phase + np.arange(reach, -reach - 1, -1) * wanted] = weights[phase]
    expected = resample_poly(noise.astype(np.float64), wanted, rate, window=whole / wanted)
    found = waveforms.resampled(torch.from_numpy(noise), rate, wanted).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it is missing"),
        (b"no sound", "is not a readable sound"),
        (b"", "it is empty"),
        (_wav(_noise(0, 0)), "it has no samples"),
        (_wav(_noise(0))[:-100], "it is cut off: 900 of 1,000 bytes of samples"),
    ],
)
def test_what_is_no_sound_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    options = _options(tmp_path, [_wav(_noise(0)), content])
    with pytest.raises(UserError, match=f"column 'audio' of the train data: row 1 .*{message}"):
        sounds.load_sounds(options, sample_rate=RATE)


def _float_wav() -> bytes:
    content = bytearray(_wav(_noise(0), width=4))
    content[20] = 3  # samples that are floats
    return bytes(content)


@pytest.mark.parametrize("kind", ["FLAC", "WAV"])
def test_other_formats_are_read_by_soundfile(tmp_path: Path, kind: str) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    wanted, written = _noise(3, 500, 2), io.BytesIO()
    soundfile.write(written, wanted, RATE, format=kind, subtype="PCM_24" if kind == "FLAC" else "FLOAT")
    splits, _ = sounds.load_sounds(_options(tmp_path, [_wav(_noise(0)), written.getvalue()]), sample_rate=RATE)
    assert np.abs(splits["train"][1]["waveform"] - wanted.mean(axis=1)).max() < 1e-6


def test_other_formats_need_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waveforms, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'unknown format: 3; what is no .* pip install "shardlaunch\[audio\]"'):
        sounds.load_sounds(_options(tmp_path, [_wav(_noise(0)), _float_wav()]), sample_rate=RATE)


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"audio": [1, 2] * 4, "label": [0, 1] * 4}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="must hold sounds, not"):
        sounds.load_sounds(SoundOptions(data=str(tmp_path / "train.parquet")), sample_rate=RATE)


def _folder(folder: Path, *classes: str, count: int = 3) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.wav").write_bytes(_wav(_noise(number)))


def test_a_folder_of_sounds(tmp_path: Path) -> None:
    _folder(tmp_path / "train", "dog", "cat")
    _folder(tmp_path / "validation", "dog")
    splits, classes = sounds.load_sounds(SoundOptions(data=str(tmp_path)), sample_rate=RATE)
    assert classes == ["cat", "dog"]
    assert [int(row["labels"]) for row in splits["train"]] == [0, 0, 0, 1, 1, 1]
    assert [int(row["labels"]) for row in splits["eval"]] == [1, 1, 1]
    splits, _ = sounds.load_sounds(SoundOptions(data=str(tmp_path / "train")), sample_rate=RATE)
    assert (len(splits["train"]), len(splits["eval"])) == (5, 1)


def test_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path / "train", "cat", "dog")
    _folder(tmp_path / "test", "fox")
    with pytest.raises(UserError, match="test/fox exists, but train/fox does not, or has no sounds"):
        sounds.load_sounds(SoundOptions(data=str(tmp_path)), sample_rate=RATE)
    (tmp_path / "train" / "cat" / "cover.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"has sounds and images: .*0.wav and .*cover.png; remove"):
        sounds.load_sounds(SoundOptions(data=str(tmp_path)), sample_rate=RATE)


def test_a_table_of_paths_and_files_that_change(tmp_path: Path) -> None:
    """The cache depends on the content of the files in a table, not on their names."""
    _folder(tmp_path / "sounds", "all", count=4)
    paths = sorted((tmp_path / "sounds" / "all").iterdir())
    for name in ("train", "test"):
        pd.DataFrame({"path": map(str, paths), "label": [*"abab"]}).to_csv(tmp_path / f"{name}.csv", index=False)
    for first in (0, 10):
        for number, path in enumerate(paths):
            path.write_bytes(_wav(_noise(first + number)))
        found, _ = _loaded(SoundOptions(data=f"{tmp_path}/t*.csv"))
        assert all(np.abs(wave - _noise(first + row)[:, 0]).max() < 1e-4 for row, wave in enumerate(found))
    paths[2].write_bytes(b"RIFF")
    with pytest.raises(UserError, match=rf"row 2 \({paths[2]}\) is not a readable sound"):
        _loaded(SoundOptions(data=f"{tmp_path}/t*.csv"))


def test_a_data_set_with_sounds_as_its_features_say(tmp_path: Path) -> None:
    rows = {"audio": [{"bytes": _wav(_noise(row)), "path": None} for row in range(4)], "label": [0, 1, 0, 1]}
    features = {"audio": datasets.Audio(sampling_rate=RATE), "label": datasets.ClassLabel(names=["cat", "dog"])}
    info = datasets.DatasetInfo(features=datasets.Features(features))
    # Of a table, because from rows it could be made with the package torchcodec only.
    table = pa.table({"audio": pa.array(rows["audio"], datasets.Audio.pa_type), "label": pa.array(rows["label"])})
    one = datasets.Dataset(datasets.table.InMemoryTable(table), info=info)
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "saved")
    one.to_parquet(tmp_path / "train.parquet")
    for source in (tmp_path / "saved", tmp_path / "train.parquet"):
        with collected() as notes:
            splits, classes = sounds.load_sounds(SoundOptions(data=str(source)), sample_rate=RATE)
        assert classes == ["cat", "dog"]
        assert "file of 1,044 bytes | cat" in notes.examples
        first = splits["train"][0]["waveform"]
        assert min(np.abs(first - _noise(row)[:, 0]).max() for row in range(4)) < 1e-4


def test_clips_are_cropped_by_seed_and_in_the_middle_and_padded_at_the_end() -> None:
    ramp = np.arange(100, dtype=np.float32)
    found, lengths = sounds.clips([ramp, ramp[:30], ramp[:40]], None, num_samples=40)
    assert torch.equal(found[0], torch.arange(30.0, 70.0))
    assert torch.equal(found[1], torch.from_numpy(np.pad(ramp[:30], (0, 10))))
    assert lengths.tolist() == [40, 30, 40]
    seeds = sample_seeds(0, 0, np.arange(200))
    together, _ = sounds.clips([ramp] * 200, seeds, num_samples=40)
    starts = together[:, 0].long()
    assert torch.equal(together, starts[:, None] + torch.arange(40.0))
    assert (int(starts.min()), int(starts.max())) == (0, 60)
    for row in (0, 7):  # the same whatever is beside it, and another one in the next epoch
        alone, _ = sounds.clips([ramp], seeds[row : row + 1], num_samples=40)
        assert torch.equal(alone[0], together[row])
    other, _ = sounds.clips([ramp] * 200, sample_seeds(0, 1, np.arange(200)), num_samples=40)
    assert not torch.equal(other, together)


def test_masks_are_spans_of_frames_and_bands_by_seed() -> None:
    ones = torch.ones(300, 30, 20)
    seeds = sample_seeds(0, 0, np.arange(300))
    options = SoundOptions(time_mask=6, frequency_mask=4)
    found = sounds.masked(ones, seeds, options)
    assert ones.all()
    frames, bands = (found.sum(dim=axis) == 0 for axis in (2, 1))
    assert torch.equal(found == 0, frames[:, :, None] | bands[:, None, :])
    for blank, longest in ((frames, 6), (bands, 4)):
        widths = blank.sum(dim=1)
        assert widths.unique().tolist() == [*range(longest + 1)]
        edges = (blank[:, 1:] & ~blank[:, :-1]).sum(dim=1) + blank[:, 0]
        assert torch.equal(edges, (widths > 0).long()), "one span"
        assert blank.any(dim=0).all(), "it may be anywhere"
    assert torch.equal(sounds.masked(ones[:1], seeds[5:6], options)[0], found[5])
    assert sounds.masked(ones, None, options) is ones


def test_the_demo_is_the_same_each_time() -> None:
    splits = syllables(2000)
    assert (len(splits["train"]), len(splits["eval"])) == (1200, 400)
    assert splits["train"].features["labels"].names == [*SYLLABLES]
    lengths = sounds.lengths_of(splits["eval"])
    assert 1000 <= lengths.min() < lengths.max() <= 2000
    assert splits["eval"].data.table.equals(syllables(2000)["eval"].data.table)
