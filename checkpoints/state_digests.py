"""Digests of a state that do not depend on how it is divided among ranks: one of the weights, one of the
optimizer, one of the average of the weights where there is one.

They follow from the CRCs of tensors, so that those of a checkpoint are known from its manifest alone.
"""

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import torch

from shardlaunch.checkpoints.digests import DIGEST_NAMES, crc64nvme, shifted
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.shares import chunks, own_pieces
from shardlaunch.checkpoints.state import Fragment, TensorSpec, checked
from shardlaunch.checkpoints.tensorfile import BYTES_PER_ELEMENT


def digests_of_state(state: Iterable[Fragment], peers: Peers) -> dict[str, str]:
    """Return the digests of a state, by their names in metrics.jsonl: none of a section without tensors. All ranks.

    Ranks that hold the same range read a part of it each. One number per section is sent.
    """
    fragments = checked(state)
    sections = list(dict.fromkeys(fragment.spec.section for fragment in fragments))
    num_after = _bytes_after(fragment.spec for fragment in fragments)
    parts = np.zeros(len(sections), dtype=np.uint64)
    for piece in own_pieces(fragments, rank=peers.rank, num_ranks=peers.num_ranks):
        rest = (piece.spec.num_elements - piece.end) * BYTES_PER_ELEMENT[piece.spec.dtype]
        crc = shifted(crc_of(piece.values), rest + num_after[piece.spec])
        parts[sections.index(piece.spec.section)] ^= np.uint64(crc)
    return {DIGEST_NAMES[section]: f"{int(crc):016x}" for section, crc in zip(sections, peers.xor(parts), strict=True)}


def crc_of(tensor: torch.Tensor, crc: int = 0) -> int:
    """Return the CRC-64/NVME of a tensor's bytes, that follow data with the CRC `crc`; on any device."""
    for chunk in chunks(tensor.detach().reshape(-1)):
        crc = crc64nvme(chunk, crc)
    return crc


def _bytes_after(specs: Iterable[TensorSpec]) -> dict[TensorSpec, int]:
    """Return how many bytes of its section come after each tensor, in the order of keys."""
    found: dict[TensorSpec, int] = {}
    by_section: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        by_section.setdefault(spec.section, []).append(spec)
    for section in by_section.values():
        backwards = sorted(section, key=lambda spec: spec.key, reverse=True)
        sums = accumulate((spec.num_bytes for spec in backwards), initial=0)
        found.update(zip(backwards, sums, strict=False))
    return found
