"""Copies of the newest state in the memory of machines, which bring back what no disk has yet."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from shardlaunch.checkpoints import memory
from shardlaunch.checkpoints.layout import CHECKPOINTS, plan_files, step_of_dir_name
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import newest_complete
from shardlaunch.checkpoints.records import Position, decode
from shardlaunch.checkpoints.shares import HostShare, Share
from shardlaunch.checkpoints.writer import save
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting.lasting import Trouble
from shardlaunch.launcher.runs.background import Messages
from shardlaunch.launcher.runs.identity import Identity
from shardlaunch.sharding.world import World

MEMORY_VARIABLE = "SHARDLAUNCH_MEMORY_DIR"
MEMORY = Path("/dev/shm")
_CHUNK_BYTES = 16 << 20


class Replicas:
    """Keeps the newest state in the memory of each rank's machine, and of the machine after it (--replicate-every)."""

    def __init__(
        self, options: Options, output_dir: Path, world: World, *, say: Callable[[str], None], warn: Messages
    ) -> None:
        self.every = options.replicate_every
        self._output_dir = output_dir
        self._world = world
        self._say = say
        self._warn = warn
        self._trouble = Trouble(warn)
        self._machines: list[list[int]] | None = None
        self._folder = _memory_dir() / hashlib.sha256(os.fsencode(output_dir.absolute())).hexdigest()[:24]

    def keep(
        self,
        position: Position,
        share: HostShare,
        *,
        run: int,
        aliases: Mapping[str, str],
        export: Callable[[Path], None],
        before: Callable[[], None],
        peers: Peers,
    ) -> None:
        """Keep a copy of a state, in place of the one before. All ranks. What fails is said once; the run goes on.

        `before` makes the log durable, which must know of all that the state does.
        """
        step, rank, num_ranks = position.step, peers.rank, peers.num_ranks
        try:
            peers.together(before)
            files = peers.together(lambda: _exported(export) if rank == 0 else {})
            head = memory.head_of(
                share, position, rank=rank, num_ranks=num_ranks, run=run, aliases=aliases, files=files
            )
            path = memory.part_path(self._folder, step, rank, num_ranks)
            peers.together(lambda: memory.write_part(path, [head, share.memory.numpy().data]))
            self._send(step, head, share.memory, peers)
            peers.together(lambda: memory.forget(self._folder, but=[step]) if self._world.is_local_main else None)
        except UserError as error:
            self._trouble.begins(f"no copy of the state is kept in memory: {error}; the run goes on, and tries again")
            return
        self._trouble.ends("a copy of the state is kept in memory again")

    def _send(self, step: int, head: bytes, values: torch.Tensor, peers: Peers) -> None:
        """Send this rank's part to the machine after its own, and write those that come. All ranks."""
        if self._machines is None:
            of_first: dict[int, list[int]] = {}
            for one, (first,) in enumerate(peers.gather([self._world.local_ranks[0]])):
                of_first.setdefault(first, []).append(one)
            self._machines = list(of_first.values())
        machines = self._machines
        if len(machines) == 1:
            return
        target = {
            rank: after[index % len(after)]
            for ranks, after in zip(machines, machines[1:] + machines[:1], strict=True)
            for index, rank in enumerate(ranks)
        }
        sizes = torch.tensor([len(head), values.numel()])
        parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8), *values.split(_CHUNK_BYTES)]
        works = [
            dist.isend(part, target[peers.rank], group=peers.group, tag=tag)
            for tag, part in enumerate([sizes, *parts])
            if part.numel()
        ]

        def receive() -> None:
            failure: OSError | None = None
            for source in (rank for rank in sorted(target) if target[rank] == peers.rank):
                chunks = _received(source, peers)
                try:
                    memory.write_part(memory.part_path(self._folder, step, source, peers.num_ranks), chunks)
                except OSError as error:  # the sender, and the others, go on
                    failure = error
                    for _ in chunks:
                        pass
            for work in works:
                assert work is not None
                work.wait()
            if failure is not None:
                raise failure

        peers.together(receive)

    def bring_back(self, identity: Identity) -> None:
        """Save the newest state that memory has, if it is whole and newer than the newest checkpoint. All ranks."""
        if not self.every:
            return
        peers, checkpoints_dir = self._world.peers, self._output_dir / CHECKPOINTS
        peers.together(self._check_memory)
        here = peers.together(lambda: memory.parts_in(self._folder) if self._world.is_local_main else [])
        everyone = peers.lists([number for part in here for number in part])
        newest = peers.together(lambda: newest_complete(checkpoints_dir) if peers.rank == 0 else None)
        (on_disk,) = peers.of_first([(step_of_dir_name(newest.name) or 0) if newest is not None else 0])
        holders: dict[tuple[int, int], dict[int, int]] = {}
        for holder, numbers in enumerate(everyone):
            for step, num_ranks, rank in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
                holders.setdefault((step, num_ranks), {}).setdefault(rank, holder)
        whole = [(step, n) for (step, n), of_rank in holders.items() if step > on_disk and len(of_rank) == n]
        for step, num_ranks in sorted(whole, reverse=True):
            try:
                self._save(step, num_ranks, holders[step, num_ranks], identity.digest(), peers)
            except UserError as error:
                self._warn(f"step {step} is not brought back from memory: {error}")
                continue
            self._say(f"brought back step {step} from memory")
            return

    def _save(self, step: int, num_ranks: int, holders: Mapping[int, int], run: int, peers: Peers) -> None:
        """Save a state of which each part is in the memory of one rank's machine. All ranks."""
        paths = {
            rank: memory.part_path(self._folder, step, rank, num_ranks)
            for rank, holder in sorted(holders.items())
            if holder == peers.rank
        }
        data = peers.together(lambda: memory.encoded_head(paths[0], run) if 0 in paths else b"")
        head = memory.decoded_head(peers.data_of(holders[0], data))
        pieces = peers.together(lambda: [piece for path in paths.values() for piece in memory.read_pieces(path, run)])
        specs = head.specs()
        save(
            self._output_dir / CHECKPOINTS,
            position=decode("memory", head.position, Position),
            share=Share(specs=specs, files=plan_files(specs), pieces=sorted(pieces, key=lambda piece: piece.position)),
            export=lambda folder: _write(head.files, folder),
            aliases=head.aliases,
            peers=peers,
        )

    def _check_memory(self) -> None:
        folder = _memory_dir().parent
        if not folder.is_dir():
            raise UserError(
                f"--replicate-every {self.every}: {folder} is no folder; set {MEMORY_VARIABLE} to one in memory, or "
                f"remove the option"
            )

    def forget(self) -> None:
        """Delete the copies: the disk has what they have, or a newer state."""
        if self.every and self._world.is_local_main:
            memory.forget(self._folder)


def _received(source: int, peers: Peers) -> Iterator[memoryview]:
    """Yield a part as it comes from a rank."""
    sizes = torch.empty(2, dtype=torch.int64)
    dist.recv(sizes, source, group=peers.group, tag=0)
    head_bytes, num_bytes = sizes.tolist()
    lengths = [head_bytes, *[_CHUNK_BYTES] * (num_bytes // _CHUNK_BYTES), num_bytes % _CHUNK_BYTES]
    for tag, length in enumerate(filter(None, lengths), start=1):
        chunk = torch.empty(length, dtype=torch.uint8)
        dist.recv(chunk, source, group=peers.group, tag=tag)
        yield chunk.numpy().data


def _exported(export: Callable[[Path], None]) -> dict[str, bytes]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        export(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _memory_dir() -> Path:
    """Return the folder of a memory file system that the runs of this user share."""
    return Path(os.environ.get(MEMORY_VARIABLE) or MEMORY / f"shardlaunch-{os.getuid()}")
