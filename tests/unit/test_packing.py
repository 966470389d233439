"""Sequences of several rows: every row once, none too long, few gaps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.training.batches import EncodedRows, collate, count_steps, plan_epoch
from distill.training.packing import pack

MAX_LENGTH = 40
shapes = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=60)
weights = st.sampled_from([0.0, 0.3, 1.0])


def encoded(shapes):
    """Rows of so many tokens of prompt and of completion; every token is another one."""
    lengths = [prompt + completion for prompt, completion in shapes]
    mask = [flag for p, c in shapes for flag in [False] * p + [True] * c]
    return EncodedRows(
        input_ids=np.arange(sum(lengths), dtype=np.int32),
        completion=np.array(mask, np.bool_),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
    )


def tokens_of(rows):
    bounds = zip(rows.row_bounds[:-1], rows.row_bounds[1:], strict=True)
    return {tuple(rows.input_ids[a:b].tolist()): rows.completion[a:b].tolist() for a, b in bounds}


@given(shapes, st.integers(0, 3))
def test_every_row_is_in_one_sequence_whole(shapes, seed):
    rows = encoded(shapes)
    packed = pack(rows, MAX_LENGTH, seed)
    assert tokens_of(packed) == tokens_of(rows)
    assert packed.num_rows == len(rows)
    assert set(packed.offsets) <= set(packed.row_offsets)


@given(shapes)
def test_no_sequence_is_empty_or_too_long(shapes):
    packed = pack(encoded(shapes), MAX_LENGTH)
    assert all(0 < length <= MAX_LENGTH for length in packed.lengths)


@given(shapes)
def test_at_most_one_sequence_is_half_empty(shapes):
    packed = pack(encoded(shapes), MAX_LENGTH)
    assert (packed.lengths <= MAX_LENGTH // 2).sum() <= 1


@given(shapes, st.integers(0, 3))
def test_the_same_seed_makes_the_same_sequences(shapes, seed):
    rows = encoded(shapes)
    one, other = pack(rows, MAX_LENGTH, seed), pack(rows, MAX_LENGTH, seed)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.offsets.tolist() == other.offsets.tolist()


def test_seeds_differ():
    rows = encoded([(3, 3)] * 50)
    assert (
        pack(rows, MAX_LENGTH, 1).input_ids.tolist() != pack(rows, MAX_LENGTH, 2).input_ids.tolist()
    )


def test_a_row_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="41 tokens"):
        pack(encoded([(1, 40)]), MAX_LENGTH)


def test_little_is_left_empty():
    lengths = np.random.default_rng(0).integers(10, 1000, size=20_000)
    rows = EncodedRows(
        input_ids=np.zeros(lengths.sum(), np.int32),
        completion=np.ones(lengths.sum(), np.bool_),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
    )
    packed = pack(rows, 2048)
    assert lengths.sum() / (2048 * len(packed)) > 0.99


@given(shapes, weights)
def test_packed_rows_count_in_the_loss_as_they_do_alone(shapes, prompt_weight):
    rows = encoded(shapes)
    packed = pack(rows, MAX_LENGTH)
    alone = rows.loss_weights(prompt_weight)
    assert packed.loss_weights(prompt_weight).sum() == pytest.approx(alone.sum())
    single = {
        int(token): weight
        for row in range(len(rows))
        for token, weight in zip(
            rows.input_ids[rows.offsets[row] : rows.offsets[row + 1]],
            rows.token_weights(row, prompt_weight),
            strict=True,
        )
    }
    for index in range(len(packed)):
        found = packed.token_weights(index, prompt_weight)
        assert found.sum() == pytest.approx(packed.loss_weights(prompt_weight)[index], rel=1e-5)
        ids = packed.input_ids[packed.offsets[index] : packed.offsets[index + 1]]
        assert found.tolist() == [single[int(token)] for token in ids]


@given(shapes, weights)
def test_positions_begin_anew_in_each_row_and_in_the_padding(shapes, prompt_weight):
    packed = pack(encoded(shapes), MAX_LENGTH)
    batch = collate(packed, range(len(packed)), prompt_weight, pad_id=-1)
    assert batch.attention_mask is None
    ends = set(packed.row_offsets.tolist())
    for index, length in enumerate(packed.lengths):
        expected = []
        for place in range(int(packed.offsets[index]), int(packed.offsets[index + 1])):
            expected.append(0 if place in ends else expected[-1] + 1)
        assert batch.position_ids[index, :length].tolist() == expected
        padding = batch.position_ids[index, length:]
        assert padding.tolist() == list(range(len(padding)))
        assert batch.weights[index, length:].sum() == 0


@given(
    shapes.filter(bool), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3)
)
def test_a_plan_of_sequences_trains_every_row_once_on_ranks_in_step(
    shapes, world_size, micro_batch_size, accumulation, epoch
):
    packed = pack(encoded(shapes), MAX_LENGTH)
    steps = plan_epoch(
        packed.lengths,
        packed.loss_weights(0.3),
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        epoch=epoch,
    )
    assert len(steps) == count_steps(len(packed), world_size, micro_batch_size, accumulation)
    seen = []
    for step in steps:
        assert {len(rank) for rank in step.micro_batches} == {accumulation}
        batches = [
            collate(packed, micro, 0.3, pad_id=-1) for rank in step.micro_batches for micro in rank
        ]
        assert step.loss_weight == pytest.approx(sum(b.weights.sum() for b in batches), rel=1e-5)
        seen += [i for rank in step.micro_batches for micro in rank for i in micro]
    assert sorted(seen) == list(range(len(packed)))
