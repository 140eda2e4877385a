"""Cut the power at any time: what the disk may hold then always gives the newest checkpoint that was saved.

    python -m tests.faults.power_loss --count 10000 --seed 1 --resume 20

The calls of a run are recorded (a new run, and a resume with retention and leftovers). An image is what a disk may hold
if the power is cut after one of them: all that an fsync has made durable, and of the rest any part, in any order:
writes that are dropped or torn at a sector, entries of folders that are dropped or undone. Nothing is taken for granted
that POSIX does not promise: the fsync of a file does not make its name durable. `--resume` also trains on from some
images.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shardlaunch.checkpoints.layout import CHECKPOINTS, MANIFEST, step_dir_name, step_of_dir_name
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import newest_valid
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.tracking import METRICS_FILE, read_metrics
from shardlaunch.launcher.runs.folder import RUN, identity_of_folder
from tests.faults.calls import Call, under_the_shim
from tests.faults.small_runs import Reference, Scenario, scenarios

SECTOR_BYTES = 512


@dataclass(eq=False)
class File:
    """A file: what is durable, what a program sees, and the writes in between."""

    durable: bytes = b""
    seen: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        at = len(self.seen) if offset < 0 else offset
        self.seen = _written(self.seen, at, data)
        self.pending.append((at, data))

    def sync(self) -> None:
        self.durable = self.seen
        self.pending.clear()

    def image(self, random_: random.Random) -> bytes:
        """Return what may be on the disk."""
        content = self.durable
        for at, data in random_.sample(self.pending, random_.randint(0, len(self.pending))):
            if random_.random() < 0.5:  # torn: some sectors of it, and zeros for those before them
                first = random_.randrange(0, len(data) // SECTOR_BYTES + 1) * SECTOR_BYTES
                last = random_.choice((len(data), first + SECTOR_BYTES * random_.randrange(1, 9)))
                content = _written(content, at + first, data[first:last])
            else:
                content = _written(content, at, data)
        return content


def _written(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at].ljust(at, b"\0") + data + content[at + len(data) :]


@dataclass(eq=False)
class Folder:
    """A folder: durable entries, entries that a program sees, and the changes in between."""

    durable: "dict[str, File | Folder]" = field(default_factory=dict)
    seen: "dict[str, File | Folder]" = field(default_factory=dict)
    pending: "list[dict[str, File | Folder | None]]" = field(default_factory=list)
    """Each change: names with what they are then, None for nothing."""

    def change(self, change: "dict[str, File | Folder | None]") -> None:
        self.pending.append(change)
        _apply(self.seen, change)

    def sync(self) -> None:
        self.durable = dict(self.seen)
        self.pending.clear()

    def image(self, random_: random.Random) -> "dict[str, File | Folder]":
        """Return entries that may be on the disk."""
        entries = dict(self.durable)
        share = random_.random()
        for change in self.pending:
            if random_.random() < share:
                _apply(entries, change)
        return entries


def _apply(entries: "dict[str, File | Folder]", change: "dict[str, File | Folder | None]") -> None:
    for name, what in change.items():
        if what is None:
            entries.pop(name, None)
        else:
            entries[name] = what


class Disk:
    """A run's folder on a disk, as the calls of the run change it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.root = _on_disk(run_dir) if run_dir.exists() else Folder()
        self.committed = -1
        """The newest step whose checkpoint is durable."""
        self.metrics_lines: list[bytes] = []

    def at(self, path: str) -> "File | Folder | None":
        found: File | Folder | None = self.root
        for name in Path(path).relative_to(self.run_dir).parts:
            found = found.seen.get(name) if isinstance(found, Folder) else None
        return found

    def do(self, call: Call) -> None:
        """Do what a call has done."""
        if call.path == str(self.run_dir):
            if call.name == "fsync":
                self.root.sync()
            return
        folder, name, what = self.at(str(Path(call.path).parent)), Path(call.path).name, self.at(call.path)
        if not isinstance(folder, Folder):
            return
        match call.name:
            case "create" | "truncate" | "append" if what is None:
                folder.change({name: File()})
            case "truncate" if isinstance(what, File) and what.seen:
                raise AssertionError(f"{call}: overwrites a file in place")
            case "mkdir" if what is None:
                folder.change({name: Folder()})
            case "unlink" | "rmdir" if what is not None:
                folder.change({name: None})
            case "rename" if what is not None:
                assert Path(call.other).parent == Path(call.path).parent
                folder.change({name: None, Path(call.other).name: what})
            case "write":
                assert isinstance(what, File), call
                what.write(call.offset, call.data)
            case "resize":
                assert isinstance(what, File), call
                assert call.offset >= len(what.seen), f"{call}: cuts a file"
                what.write(call.offset, b"")
            case "fsync":
                assert what is not None, call
                what.sync()
                if name == CHECKPOINTS and isinstance(what, Folder):
                    steps = [step_of_dir_name(entry) for entry in what.seen]
                    self.committed = max([self.committed, *[step for step in steps if step is not None]])

    def write_image(self, folder: Path, random_: random.Random) -> None:
        """Write what may be on the disk after the power was cut."""
        _write_image(self.root, folder, random_)


def _on_disk(path: Path) -> Folder:
    folder = Folder()
    for entry in path.iterdir():
        if entry.is_dir():
            folder.seen[entry.name] = _on_disk(entry)
        else:
            folder.seen[entry.name] = File(durable=(data := entry.read_bytes()), seen=data)
    folder.sync()
    return folder


def _write_image(of: Folder, folder: Path, random_: random.Random) -> None:
    folder.mkdir()
    for name, what in of.image(random_).items():
        if isinstance(what, Folder):
            _write_image(what, folder / name, random_)
        else:
            (folder / name).write_bytes(what.image(random_))


class Recording:
    """The calls of a run, and what its checkpoints and its log have at the end."""

    def __init__(self, scenario: Scenario, run_dir: Path) -> None:
        self.scenario, self.run_dir = scenario, run_dir
        scenario.prepare(run_dir)
        self.start = Disk(run_dir)
        trial = scenario.run(run_dir, records_data=True)
        assert not any(trial.statuses), trial.output
        self.calls = trial.calls
        self.manifests = {
            path.parent.name: path.read_bytes() for path in run_dir.rglob(MANIFEST) if path.parent.name[0] != "."
        }
        if scenario.template is not None:
            self.manifests |= {path.parent.name: path.read_bytes() for path in scenario.template.rglob(MANIFEST)}
        for call in self.calls:
            if call.name == "write" and Path(call.path).name == MANIFEST:
                self.manifests[Path(call.path).parent.name.removeprefix(".staging-")] = call.data
        self.lines = {line["step"]: line for line in read_metrics(run_dir)}
        for call in self.calls:
            self.start.do(call)
        assert (run_dir / METRICS_FILE).read_bytes() == self.start.at(str(run_dir / METRICS_FILE)).seen  # type: ignore[union-attr]
        scenario.prepare(run_dir)
        self.start = Disk(run_dir)


def problem(image: Path, recording: Recording, committed: int) -> str:
    """Read an image as a resume does, and return what is wrong with it, or ""."""
    said: list[str] = []
    try:
        identity_of_folder(image)
        found = newest_valid(image / CHECKPOINTS, peers=Peers(), warn=said.append)
    except UserError as error:
        return f"refused: {error}".replace(str(image), "")
    if found is None:
        return "" if committed < 0 else f"no checkpoint, but {committed} was saved"
    if found.step < committed:
        return f"step {found.step}, but {committed} was saved"
    if (found.step_dir / MANIFEST).read_bytes() != recording.manifests[step_dir_name(found.step)]:
        return f"step {found.step} is another one"
    if said:
        return f"skipped: {said}".replace(str(image), "")
    lines = {line["step"]: line for line in read_metrics(image, warn=lambda text: None)}
    missing = [step for step, line in recording.lines.items() if step <= found.step and lines.get(step) != line]
    if missing:
        return f"metrics lack steps {missing} of {found.step}"
    return "" if (image / RUN).exists() else f"no {RUN}"


def run(
    count: int, seed: int, *, num_resumed: int = 0, only: str = "on 1", say: Callable[[str], object] = print
) -> int:
    """Make and check `count` images and return how many were bad."""
    counts: Counter[str] = Counter()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        folder = Path(name).resolve()
        recordings = [Recording(one, folder / "run") for one in scenarios(folder, only)]
        reference = Reference(recordings[0].scenario, folder / "reference")
        for recording in recordings:
            say(f"{recording.scenario.name}: {len(recording.calls)} calls that change something")
        places = [(of, cut) for of in recordings for cut in range(len(of.calls) + 1)]
        for number in range(count):
            recording, cut = places[number % len(places)]
            if cut == 0 or number == 0:
                recording.scenario.prepare(recording.run_dir)
                disk = Disk(recording.run_dir)
                disk.committed = 4 if recording.scenario.template is not None else -1
            else:
                disk.do(recording.calls[cut - 1])
            image = folder / "image"
            disk.write_image(image, random.Random(f"{seed} {number}"))
            found = problem(image, recording, disk.committed)
            if not found and num_resumed and number % max(1, count // num_resumed) == 0:
                trial = recording.scenario.run(image)
                differences = reference.differences(image) or list(map(str, recording.scenario.leftovers(image)))
                found = f"resumed with {trial.statuses}: {differences}" if any(trial.statuses) or differences else ""
                counts["resumed"] += 1
            counts[f"BAD: {found}" if found else "the newest or a newer one"] += 1
            if found and counts[f"BAD: {found}"] == 1:
                last = recording.calls[cut - 1] if cut else "the start"
                say(f"{recording.scenario.name}, image {number}, after {last}: {found}".replace(str(folder), ""))
            shutil.rmtree(image)
    for ended, times in sorted(counts.items()):
        say(f"{times:6} {ended}")
    return sum(times for ended, times in counts.items() if ended.startswith("BAD"))


if __name__ == "__main__":
    under_the_shim()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=int, default=20)
    arguments = parser.parse_args()
    sys.exit(bool(run(arguments.count, arguments.seed, num_resumed=arguments.resume)))
