"""Damage the records of a run in random ways: each is read as it was, refused with one message, or passed over.

    python -m tests.faults.records --count 20000 --seed 1

A quarter of the changes is what a disk does: the digests do not fit any more. In the others a hand, or another tool,
has written digests anew, so that only the schemas stand between the file and the run. `--resume` also trains on from
what was accepted with another content.
"""

import argparse
import contextlib
import json
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from shardlaunch import UserError, fit
from shardlaunch.checkpoints.digests import crc64nvme
from shardlaunch.checkpoints.layout import CHECKPOINTS, MANIFEST, RECIPE, TRAINER_STATE, step_dir_name
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import newest_complete, newest_valid
from shardlaunch.launcher.reporting.tracking import METRICS_FILE, read_metrics
from shardlaunch.launcher.runs.folder import RUN, identity_of_folder
from shardlaunch.launcher.runs.identity import Identity
from shardlaunch.launcher.runs.result import Result
from tests.recipes import NetRecipe

OPTIONS: dict[str, Any] = {"max_steps": 4, "eval_every": 1, "threads_per_rank": 1, "keep": 0, "save_every": 1}
NEWEST, BEFORE = 3, 2
INDEX = "model.safetensors.index.json"
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -1e-300, 2**31, 2**63 - 1, 2**63, -(2**70), 10**400, 1e308),
    *("", "x", "NaN", "Infinity", "1", "../x", "a/b", "\x1b[31m", "\u202e", "\x00", "é" * 300, "step"),
    *([], {}, [0], [[]], [None], {"a": 1}, {"": {}}, [1, "x"], [-1, 3], [10**6] * 9),
)


class Target:
    """A run of three steps on the disk, with a checkpoint of each."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        fit(NetRecipe, output_dir=self.run_dir, stop_at_step=NEWEST, **OPTIONS)
        self.step_dir = self.run_dir / CHECKPOINTS / step_dir_name(NEWEST)
        self.weights = next(self.step_dir.glob("model-*.safetensors"))
        self.files = {path: path.read_bytes() for path in (*self.step_dir.iterdir(), self.run_dir / RUN, self.metrics)}
        self.expected = self.read()
        assert self.expected["step"] == NEWEST

    @property
    def metrics(self) -> Path:
        return self.run_dir / METRICS_FILE

    def restore(self) -> None:
        """Put all files back."""
        for path, data in self.files.items():
            is_file = path.is_file() and not path.is_symlink()
            if not is_file or path.stat().st_size != len(data) or path.read_bytes() != data:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
                path.write_bytes(data)

    def read(self) -> dict[str, Any]:
        """Read all that a resume and a report read. Raises UserError."""
        checkpoint = newest_valid(self.run_dir / CHECKPOINTS, peers=Peers(), warn=ignored)
        assert checkpoint is not None
        recipe = checkpoint.recipe
        Identity(identity=recipe.run.identity, warn=recipe.run.warn, former_digest=str).check(
            recipe.run, "here", hint=""
        )
        with warnings.catch_warnings(action="ignore"):  # of lines that are left out
            result = Result.of_folder(self.run_dir)
        looks_complete = newest_complete(self.run_dir / CHECKPOINTS)
        return {
            "step": checkpoint.step,
            "manifest": checkpoint.manifest,
            "position": checkpoint.position,
            "recipe": recipe,
            "tensors": {s.key: checkpoint.read(s, 0, s.num_elements).tolist() for s in checkpoint.specs()},
            "run": identity_of_folder(self.run_dir),
            "complete": looks_complete,
            "result": (result.step, result.best_value, result.last_checkpoint),
            "metrics": [line for line in read_metrics(self.run_dir, warn=ignored) if line["step"] <= BEFORE],
        }

    def sign(self, changed: Path | None = None) -> None:
        """Write the digest of a changed file into the manifest, and the manifest's own."""
        body = json.loads((self.step_dir / MANIFEST).read_bytes())
        if not isinstance(body, dict):
            return
        if changed is not None:
            data = changed.read_bytes()
            body["files"][changed.name] = {"bytes": len(data), "crc64nvme": f"{crc64nvme(data):016x}"}
        if body.get("version") in (1, 2, 3):
            for name in body["files"]:
                data = (self.step_dir / name).read_bytes()
                body["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
            for tensor in body["tensors"]:
                tensor.pop("crc64nvme", None)
        body.pop("xxh3_128", None)
        text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        (self.step_dir / MANIFEST).write_text(json.dumps({**body, "xxh3_128": xxhash.xxh3_128_hexdigest(text)}))


def ignored(text: str) -> None:
    """Take a warning that is expected."""


def outcome(target: Target, *, trains: bool = False) -> str:
    """Read a changed run and return `refused`, `passed over`, `equal`, or `other` for what was accepted as valid."""
    try:
        found = target.read()
    except UserError as error:
        if not str(error).isprintable():
            raise AssertionError(f"not printable: {error!r}") from error
        return "refused"
    if found["step"] == BEFORE:
        return "passed over"
    if same(found, target.expected):
        return "equal"
    if trains:
        copy = target.run_dir.with_name("copy")
        shutil.copytree(target.run_dir, copy)
        try:
            with warnings.catch_warnings(action="ignore"):
                fit(NetRecipe, output_dir=copy, **OPTIONS)
        except UserError:
            return "other, and refused by the run"
        finally:
            shutil.rmtree(copy)
    return "other"


def same(found: Any, expected: Any) -> bool:
    """Return whether two read runs are equal; NaN equals itself."""
    return repr(found) == repr(expected)


def change_json(value: Any, random_: random.Random) -> Any:
    """Return a JSON value with one change somewhere in it."""
    if isinstance(value, dict | list) and value and random_.random() < 0.85:
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = random_.choice(list(copy)) if isinstance(copy, dict) else random_.randrange(len(copy))
        match random_.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                copy[random_.choice(["x", "", "step", f"{key} ", "\x1b"])] = copy.pop(key)
            case 1:
                copy.append(copy[key])
            case 2 if isinstance(copy, dict):
                copy["x"] = random_.choice(_VALUES)
            case _:
                copy[key] = change_json(copy[key], random_)
        return copy
    if isinstance(value, int) and random_.random() < 0.3:
        return value + random_.choice((-1, 1))
    return random_.choice(_VALUES)


def change_bytes(data: bytes, random_: random.Random) -> bytes:
    """Return damaged bytes."""
    at = random_.randrange(len(data) or 1)
    return random_.choice(
        (
            lambda: data[:at] + bytes([data[at] ^ (1 << random_.randrange(8))]) + data[at + 1 :],
            lambda: data[:at],
            lambda: data[:at] + data[at + random_.randrange(1, 40) :],
            lambda: data[:at] + random_.randbytes(8) + data[at:],
            lambda: data + random_.choice((b"x", b"\0" * 4096, data)),
            lambda: random_.choice((b"", b"null", b"[]", b"{}", b"NaN", b"[" * 100_000, b'{"a":' * 50_000, b"1e9999")),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.decode("latin-1").encode("utf-16"),
            lambda: data.replace(b":", b': NaN, "x":', 1),
            lambda: data.replace(b": ", b": " + b"9" * 5000, 1),
            lambda: data.replace(b"{", b'{"step": 1, "step": 2, ', 1),
        )
    )()


def change_header(data: bytes, random_: random.Random) -> bytes:
    """Return a safetensors file with a change in its header."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if random_.random() < 0.7:
        header = json.dumps(change_json(json.loads(header), random_)).encode()
    elif random_.random() < 0.5:
        header = change_bytes(header, random_)
    else:
        return random_.choice((0, 1, size - 1, size + 8, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    return len(header).to_bytes(8, "little") + header + rest


def damage(target: Target, random_: random.Random) -> str:
    """Change one file of the run and return what was done."""
    weights = target.weights.name
    names = (MANIFEST, MANIFEST, TRAINER_STATE, RECIPE, INDEX, weights, weights, RUN, METRICS_FILE)
    name = random_.choice(names)
    path = (target.run_dir if name in (RUN, METRICS_FILE) else target.step_dir) / name
    data = target.files[path]
    if name == weights:
        path.write_bytes(change_header(data, random_))
        how = "header"
    elif random_.random() < 0.3:
        path.write_bytes(change_bytes(data, random_))
        how = "bytes"
    elif name == METRICS_FILE:
        lines = data.splitlines()
        number = random_.randrange(len(lines))
        lines[number] = json.dumps(change_json(json.loads(lines[number]), random_)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
        how = "line"
    else:
        path.write_text(json.dumps(change_json(json.loads(data), random_)))
        how = "value"
    if path.parent == target.step_dir and random_.random() < 0.75:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            target.sign(None if name == MANIFEST else path)
            how += ", signed"
    return f"{name}: {how}"


def run(count: int, seed: int, *, trains: bool = False, say: Callable[[str], object] = print) -> Counter[str]:
    """Damage a run `count` times and return how often it ended how. Raises AssertionError with the damage."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        for number in range(count):
            random_ = random.Random(f"{seed} {number}")
            what = damage(target, random_)
            try:
                ended = outcome(target, trains=trains)
            except BaseException as error:
                raise AssertionError(
                    f"{what} (seed {seed}, number {number}): {type(error).__name__}: {error}"
                ) from error
            counts[ended] += 1
            counts[f"{what}: {ended}"] += 1
            target.restore()
        assert same(target.read(), target.expected)
    for what, times in sorted(counts.items()):
        say(f"{times:6} {what}")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.count, arguments.seed, trains=arguments.resume)
