"""Which images are the same, or nearly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int, UInt8, UInt64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

_BITS = 64
_ONES = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)
"""In every 16-bit number; numpy counts bits from version 2.0 on only."""


def groups_of_equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """Positions that have the same key, of keys that occur more than once, in order of their first."""
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        positions[key].append(position)
    return [group for group in positions.values() if len(group) > 1]


def groups_of_near(hashes: UInt64[np.ndarray, " n"], *, most: int) -> list[list[int]]:
    """Positions whose hashes are linked by steps of at most ``most`` bits.

    Args:
        hashes: Perceptual hashes.
        most: Bits in which two neighbours differ at most.
    """
    if len(hashes) < 2:
        return []
    unique, inverse = np.unique(hashes, return_inverse=True)
    pairs = _near_pairs(unique, most)
    links = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (len(unique), len(unique)))
    _, component = connected_components(links, directed=False)
    return groups_of_equal(component[inverse].tolist())


def _near_pairs(hashes: UInt64[np.ndarray, " n"], most: int) -> Int[np.ndarray, "m 2"]:
    """Pairs of different hashes that differ in at most ``most`` bits.

    Cut into ``most + 1`` parts, two such hashes agree in one part at least: only those are compared.
    """
    edges = np.linspace(0, _BITS, most + 2).astype(int)
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges):
        part = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        part, ordered = part[order], hashes[order]
        places = np.arange(len(order))
        for step in range(1, len(order)):  # each with the one so many places on, as long as they agree in this part
            places = places[places + step < len(order)]
            places = places[part[places] == part[places + step]]
            if not len(places):
                break
            near = places[_count_bits(ordered[places] ^ ordered[places + step]) <= most]
            found.append(np.stack([order[near], order[near + step]], 1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _count_bits(numbers: UInt64[np.ndarray, " n"]) -> UInt8[np.ndarray, " n"]:
    """Ones in each."""
    return np.asarray(_ONES[numbers.view(np.uint16)].reshape(-1, 4).sum(1, dtype=np.uint8))
