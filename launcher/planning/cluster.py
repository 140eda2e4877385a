"""The machines of a plan, and how long they take: collectives, a step, a save. Estimates, from the numbers given."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

from shardlaunch.errors import UserError
from shardlaunch.launcher.planning.ledger import Collective

GIB = 1 << 30
TFLOPS = {"fp32": 40.0, "bf16": 400.0, "fp16": 400.0, "fp8": 600.0}
"""What an H100 reaches in training, of its peak of 67, 989 and 1,979."""
DEVICE_GBPS = 2_500.0
"""Of a GPU's own memory."""
HOST_GBPS = 25.0
"""Between a GPU and its host's memory."""
HOST_UPDATE_GBPS = 10.0
"""Of an optimizer in host memory, for each rank's share of the cores."""
HOP_S, NETWORK_HOP_S = 1e-6, 5e-6
"""From one rank to the next on a machine, and between machines."""
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks, and speeds per GPU."""

    ranks: int
    gpus_per_node: int = 8
    gpu_gib: float = 80.0
    reserve_gib: float = 2.0
    """What is not tensors: CUDA's context, NCCL's buffers, workspaces of libraries, gaps between blocks."""
    tflops: float = 0.0
    """Reached in training; 0: as TFLOPS says for the precision."""
    node_gbps: float = 300.0
    network_gbps: float = 40.0
    disk_gbps: float = 2.0
    """Of the file system that all ranks write to."""

    def __post_init__(self) -> None:
        for name, value in (("ranks", self.ranks), ("gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        speeds = {
            "gpu-memory": self.gpu_gib,
            "node-bandwidth": self.node_gbps,
            "network-bandwidth": self.network_gbps,
            "disk-bandwidth": self.disk_gbps,
        }
        for name, speed in speeds.items():
            if not 0 < speed < float("inf"):
                raise UserError(f"--{name} {speed:g}: must be above 0")
        for name, number in (("tflops", self.tflops), ("reserve", self.reserve_gib)):
            if not 0 <= number < float("inf"):
                raise UserError(f"--{name} {number:g}: must be at least 0")
        if self.reserve_gib >= self.gpu_gib:
            raise UserError(f"--reserve {self.reserve_gib:g}: leaves nothing of --gpu-memory {self.gpu_gib:g}")

    @property
    def num_nodes(self) -> int:
        return -(-self.ranks // self.gpus_per_node)

    @property
    def ranks_per_node(self) -> int:
        return min(self.ranks, self.gpus_per_node)

    def fits(self, peak_bytes: int) -> bool:
        """Return whether so many bytes of tensors fit."""
        return peak_bytes <= (self.gpu_gib - self.reserve_gib) * GIB

    def collective_s(self, collective: Collective) -> float:
        """Return how long a collective takes: on a ring, or on trees, which have fewer hops and half the speed."""
        size = len(collective.ranks)
        if size == 1:
            return 0.0
        num_nodes = len({rank // self.gpus_per_node for rank in collective.ranks})
        gbps = self.node_gbps if num_nodes == 1 else self.network_gbps
        rounds = 2 if collective.kind == "all-reduce" else 1
        on_ring_s = rounds * ((num_nodes - 1) * NETWORK_HOP_S + (size - num_nodes) * HOP_S)
        on_trees_s = rounds * log2(size) * (HOP_S if num_nodes == 1 else NETWORK_HOP_S)
        sending_s = wire_bytes(collective) / (gbps * 1e9)
        return min(sending_s + on_ring_s, 2 * sending_s + on_trees_s)


def wire_bytes(collective: Collective) -> float:
    """Return the bytes that each rank sends."""
    size = len(collective.ranks)
    rounds = 2 if collective.kind == "all-reduce" else 1
    return rounds * collective.num_bytes * (size - 1) / size


def step_time_s(
    cluster: Cluster,
    collectives: Mapping[Collective, int],
    *,
    flops: float,
    slots: int,
    precision_name: str,
    is_gathered: bool,
    device_bytes: int,
    host_bytes: int,
) -> float:
    """Return how long a step takes: computing, the communication that computing does not hide, and the update.

    `is_gathered`: weights are gathered as modules run, beside all of the computing; otherwise gradients are summed
    beside the last backward pass. `device_bytes` and `host_bytes` is what the update reads there.
    """
    compute_s = flops / ((cluster.tflops or TFLOPS[precision_name]) * 1e12)
    communication_s = sum(count * cluster.collective_s(one) for one, count in collectives.items())
    hides_s = compute_s if is_gathered else BACKWARD_SHARE * compute_s / slots
    update_s = 2 * device_bytes / (DEVICE_GBPS * 1e9)
    if host_bytes:
        update_s += host_bytes / (HOST_UPDATE_GBPS * 1e9) + host_bytes / 2 / (HOST_GBPS * 1e9)
    return compute_s + max(0.0, communication_s - hides_s) + update_s
