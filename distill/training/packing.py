"""Rows share sequences: which go together, so that few tokens are padding.

Pure: depends on nothing but its arguments, so that a run that goes on after a crash has the
same sequences. What a sequence looks like in a batch is for ``batches``.
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from distill.training.batches import EncodedRows, PackedRows

POOL_ROWS = 10_000
"""Rows are sorted by length among so many, drawn at random: full sequences, still mixed."""


def pack(rows: EncodedRows, max_length: int, seed: int = 0) -> PackedRows:
    """Put the rows into sequences, each row whole and once.

    The sequences are the same in every epoch, so that their number is known beforehand.

    Args:
        rows: None longer than ``max_length``.
        max_length: Most tokens of a sequence.
        seed: Decides which rows of like length go where.

    Raises:
        ValueError: A row is longer.
    """
    longest = int(rows.lengths.max(initial=0))
    if longest > max_length:
        raise ValueError(f"a row of {longest} tokens fits no sequence of {max_length}")
    order = np.random.default_rng(seed).permutation(len(rows))
    pools = np.array_split(order, max(1, -(-len(rows) // POOL_ROWS)))
    bins = [members for pool in pools for members in _best_fit(pool, rows.lengths, max_length)]
    taken = rows.take([row for members in bins for row in members])
    bounds = np.cumsum([0, *map(len, bins)], dtype=np.int64)
    return PackedRows(
        input_ids=taken.input_ids,
        completion=taken.completion,
        offsets=taken.offsets[bounds],
        row_offsets=taken.offsets,
        sources=taken.sources,
    )


def _best_fit(
    pool: NDArray[np.int64], lengths: NDArray[np.int64], max_length: int
) -> list[list[int]]:
    """Longest first, each row into the fullest sequence that has room for it."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """Tokens of room and the sequence, in order."""
    for row in pool[np.argsort(-lengths[pool], kind="stable")]:
        length = int(lengths[row])
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = max_length, len(bins)
            bins.append([])
        bins[number].append(int(row))
        insort(rooms, (room - length, number))
    return bins
