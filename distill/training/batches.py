"""Which rows each rank trains on in each step, and the arrays it gets.

Pure: numbers in, numbers out. A plan depends on nothing but its arguments, so every rank
makes the same one, and so does a run that goes on after a crash. What the arrays mean to
a model is for ``engine``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

POOL_STEPS = 64
"""Rows are sorted by length among this many steps' worth: little padding, still random."""


@dataclass(frozen=True)
class EncodedRows:
    """Tokenised rows, end to end, as arrays that workers of one machine can share.

    Attributes:
        input_ids: int32[N], the tokens of all rows.
        completion: bool[N], whether a token belongs to its row's completion.
        offsets: int64[R + 1]; row ``i`` is ``offsets[i]:offsets[i + 1]``.
        sources: int64[R], which conversation each row is of; empty where that is not known.
    """

    input_ids: NDArray[np.int32]
    completion: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    sources: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), kw_only=True)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def row_bounds(self) -> NDArray[np.int64]:
        """int64[R + 1], where rows begin, and where the last one ends."""
        return self.offsets

    @property
    def num_rows(self) -> int:
        """How many rows there are, in however many sequences."""
        return len(self.row_bounds) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64[R], tokens of each row."""
        return np.diff(self.offsets)

    def token_weights(self, row: int, prompt_weight: float) -> NDArray[np.float32]:
        """float32[T], what each token of a row counts in the loss.

        The first token counts nothing: there is nothing to predict it from.
        """
        completion = self.completion[self.offsets[row] : self.offsets[row + 1]]
        weights = np.where(completion, 1.0, prompt_weight).astype(np.float32)
        weights[self._begins(row)] = 0.0
        return weights

    def loss_weights(self, prompt_weight: float) -> NDArray[np.float64]:
        """float64[R], what each row counts in the loss."""
        weights = np.where(self.completion, 1.0, prompt_weight)
        weights[self.row_bounds[:-1]] = 0.0
        return np.add.reduceat(weights, self.offsets[:-1]) if len(self) else np.zeros(0)

    @property
    def longest_completion(self) -> int:
        """Most tokens that have to be generated in one go."""
        begins = self.completion.copy()
        begins[1:] &= ~self.completion[:-1]
        firsts = self.row_bounds[:-1]
        begins[firsts] = self.completion[firsts]
        runs = np.flatnonzero(begins)
        if not len(runs):
            return 0
        return int(np.add.reduceat(self.completion, runs, dtype=np.int64).max())

    def conversations(self, index: int) -> NDArray[np.int64]:
        """Which conversations one of a plan's rows is made of."""
        first, last = np.searchsorted(self.row_bounds, self.offsets[index : index + 2])
        return self.sources[first:last]

    def take(self, order: Sequence[int]) -> "EncodedRows":
        """The rows of these numbers, in this order."""
        parts = [slice(self.offsets[row], self.offsets[row + 1]) for row in order]
        return EncodedRows(
            input_ids=np.concatenate([self.input_ids[:0], *(self.input_ids[p] for p in parts)]),
            completion=np.concatenate([self.completion[:0], *(self.completion[p] for p in parts)]),
            offsets=np.cumsum([0, *self.lengths[list(order)]], dtype=np.int64),
            sources=self.sources[list(order)] if len(self.sources) else self.sources,
        )

    def _begins(self, index: int) -> NDArray[np.int64]:
        """Where rows begin in one of these."""
        start, stop = self.offsets[index : index + 2]
        first, last = np.searchsorted(self.row_bounds, (start, stop))
        return self.row_bounds[first:last] - start


@dataclass(frozen=True)
class PackedRows(EncodedRows):
    """Tokenised rows of which several make one sequence; a plan is made of the sequences.

    Attributes:
        offsets: int64[S + 1], of the sequences.
        row_offsets: int64[R + 1], of the rows in them.
    """

    row_offsets: NDArray[np.int64]

    @property
    def row_bounds(self) -> NDArray[np.int64]:
        """As of single rows."""
        return self.row_offsets

    def positions(self, index: int) -> NDArray[np.int64]:
        """int64[T], the place of each of a sequence's tokens in its row."""
        places = np.arange(self.lengths[index])
        begins = self._begins(index)
        return places - np.repeat(begins, np.diff([*begins, len(places)]))


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        micro_batches: Row indices, by rank and then by micro step. Every rank has as many;
            where rows are fewer than micro batches, some are empty.
        loss_weight: Sum of all its rows' loss weights, over all ranks.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    loss_weight: float


@dataclass(frozen=True)
class Batch:
    """One micro batch, padded on the right.

    Attributes:
        input_ids: int64[B, T]
        attention_mask: int64[B, T], 0 on padding; None of packed rows.
        weights: float32[B, T], what each token counts in the loss; 0 on padding.
        position_ids: int64[B, T] of packed rows, from 0 in each and in the padding, which
            is how a model knows them apart; None of single rows.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64] | None
    weights: NDArray[np.float32]
    position_ids: NDArray[np.int64] | None = None

    @cached_property
    def predicting(self) -> NDArray[np.bool_]:
        """bool[B, T], the positions whose next token counts; the first where none does."""
        predicting = np.zeros(self.weights.shape, dtype=np.bool_)
        predicting[:, :-1] = self.weights[:, 1:] != 0
        if not predicting.any():
            predicting[0, 0] = True
        return predicting

    def as_one_sequence(self) -> "Batch":
        """The same packed rows end to end, as [1, B * T]: they begin anew there as well."""
        if self.position_ids is None:
            raise ValueError("single rows are known apart by their mask, not by their positions")
        return Batch(
            self.input_ids.reshape(1, -1),
            None,
            self.weights.reshape(1, -1),
            self.position_ids.reshape(1, -1),
        )


def plan_epoch(
    lengths: Sequence[int] | NDArray[np.int64],
    loss_weights: Sequence[float] | NDArray[np.float64],
    *,
    world_size: int,
    micro_batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> list[Step]:
    """Divide all rows into steps, micro batches and ranks, every row once.

    Steps differ by at most one row in size, so that no last step of a few rows moves the
    weights as much as a full one; rows of like length go together, and at each micro step
    all ranks have about as much to do.

    Args:
        lengths: Tokens of each row, [R].
        loss_weights: What each row counts in the loss, [R].
        world_size: Number of ranks.
        micro_batch_size: Most rows that a rank takes at once.
        accumulation: Micro batches of a rank in each step.
        seed: With ``epoch``, decides the order.
        epoch: Each epoch has its own order.
    """
    lengths, loss_weights = np.asarray(lengths), np.asarray(loss_weights)
    if len(lengths) == 0:
        return []
    num_micro_batches = world_size * accumulation
    num_steps = count_steps(len(lengths), world_size, micro_batch_size, accumulation)
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    pools = np.array_split(order, -(-num_steps // POOL_STEPS))
    order = np.concatenate([_by_length(pool, lengths) for pool in pools])
    steps = np.array_split(order, num_steps)
    return [
        Step(
            micro_batches=_deal(_by_length(steps[i], lengths), world_size, num_micro_batches),
            loss_weight=float(loss_weights[steps[i]].sum()),
        )
        for i in random.permutation(num_steps)
    ]


def count_steps(num_rows: int, world_size: int, micro_batch_size: int, accumulation: int) -> int:
    """Number of steps in an epoch."""
    return -(-num_rows // (world_size * micro_batch_size * accumulation))


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, such as a seed, a step and a rank."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def collate(rows: EncodedRows, indices: Sequence[int], prompt_weight: float, pad_id: int) -> Batch:
    """The arrays of one micro batch.

    An empty one becomes a row that counts nothing: a rank without rows still has to take
    part in every collective operation.
    """
    length = max((int(rows.lengths[i]) for i in indices), default=2)
    shape = (max(len(indices), 1), max(length, 2))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    for place, row in enumerate(indices):
        tokens = rows.input_ids[rows.offsets[row] : rows.offsets[row + 1]]
        input_ids[place, : len(tokens)] = tokens
        attention_mask[place, : len(tokens)] = 1
        weights[place, : len(tokens)] = rows.token_weights(row, prompt_weight)
    if not len(indices):
        attention_mask[:] = 1
    if isinstance(rows, PackedRows):
        return Batch(input_ids, None, weights, _positions(rows, indices, shape))
    return Batch(input_ids, attention_mask, weights)


def _positions(
    rows: PackedRows, indices: Sequence[int], shape: tuple[int, int]
) -> NDArray[np.int64]:
    positions = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    for place, index in enumerate(indices):
        length = int(rows.lengths[index])
        positions[place, :length] = rows.positions(index)
        positions[place, length:] -= length
    return positions


def _by_length(rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.argsort(lengths[rows], kind="stable")]


def _deal(
    rows: NDArray[np.int64], world_size: int, num_micro_batches: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    parts = [tuple(int(row) for row in part) for part in np.array_split(rows, num_micro_batches)]
    return tuple(tuple(parts[rank::world_size]) for rank in range(world_size))
