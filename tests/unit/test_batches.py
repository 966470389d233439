import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.training.batches import EncodedRows, collate, count_steps, plan_epoch

plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(2, 300), min_size=1, max_size=200),
        "world_size": st.integers(1, 5),
        "micro_batch_size": st.integers(1, 9),
        "accumulation": st.integers(1, 4),
        "seed": st.integers(0, 3),
        "epoch": st.integers(0, 3),
    }
)


def plan(arguments):
    lengths = arguments["lengths"]
    return plan_epoch(loss_weights=[length / 2 for length in lengths], **arguments)


def rows_of(step):
    return [row for rank in step.micro_batches for micro in rank for row in micro]


def encoded(*rows):
    """Rows given as (prompt tokens, completion tokens)."""
    ids = [token for prompt, completion in rows for token in (*prompt, *completion)]
    mask = [flag for p, c in rows for flag in ([False] * len(p) + [True] * len(c))]
    return EncodedRows(
        input_ids=np.array(ids, np.int32),
        completion=np.array(mask, np.bool_),
        offsets=np.cumsum([0, *(len(p) + len(c) for p, c in rows)], dtype=np.int64),
    )


@given(plans)
def test_every_row_is_trained_on_exactly_once_an_epoch(arguments):
    seen = [row for step in plan(arguments) for row in rows_of(step)]
    assert sorted(seen) == list(range(len(arguments["lengths"])))


@given(plans)
def test_all_ranks_take_part_in_every_micro_step(arguments):
    for step in plan(arguments):
        assert len(step.micro_batches) == arguments["world_size"]
        assert {len(rank) for rank in step.micro_batches} == {arguments["accumulation"]}


@given(plans)
def test_no_micro_batch_is_larger_than_asked(arguments):
    sizes = [len(m) for step in plan(arguments) for rank in step.micro_batches for m in rank]
    assert max(sizes) <= arguments["micro_batch_size"]


@given(plans)
def test_steps_differ_by_at_most_one_row(arguments):
    sizes = [len(rows_of(step)) for step in plan(arguments)]
    assert max(sizes) - min(sizes) <= 1


@given(plans)
def test_a_step_knows_the_loss_weight_of_its_rows(arguments):
    for step in plan(arguments):
        weight = sum(arguments["lengths"][row] / 2 for row in rows_of(step))
        assert step.loss_weight == pytest.approx(weight)


@given(plans)
def test_the_same_arguments_make_the_same_plan(arguments):
    assert plan(arguments) == plan(arguments)


@given(plans)
def test_the_number_of_steps_is_known_beforehand(arguments):
    expected = count_steps(
        len(arguments["lengths"]),
        arguments["world_size"],
        arguments["micro_batch_size"],
        arguments["accumulation"],
    )
    assert len(plan(arguments)) == expected


def test_epochs_differ_in_order():
    first, second = (
        plan_epoch([5] * 64, [1.0] * 64, world_size=1, micro_batch_size=8, epoch=epoch)
        for epoch in (1, 2)
    )
    assert first != second


def test_no_rows_make_no_steps():
    assert plan_epoch([], [], world_size=2, micro_batch_size=4) == []


def test_little_is_padding_when_lengths_vary():
    lengths = np.random.default_rng(0).integers(10, 1000, size=4096)
    steps = plan_epoch(lengths, lengths, world_size=2, micro_batch_size=8)
    micro_batches = [micro for step in steps for rank in step.micro_batches for micro in rank]
    padded = sum(len(micro) * max(lengths[list(micro)]) for micro in micro_batches)
    assert lengths.sum() / padded > 0.97


def test_the_first_token_of_a_row_counts_nothing():
    rows = encoded(([1, 2], [3, 4]), ([], [5, 6]))
    assert rows.token_weights(0, 0.25).tolist() == [0.0, 0.25, 1.0, 1.0]
    assert rows.token_weights(1, 0.25).tolist() == [0.0, 1.0]
    assert rows.loss_weights(0.25).tolist() == [2.25, 1.0]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_a_batch_holds_its_rows_tokens_and_weights(shapes, prompt_weight):
    rows = encoded(*[(range(prompt), range(completion)) for prompt, completion in shapes])
    batch = collate(rows, range(len(rows)), prompt_weight, pad_id=99)
    for row, length in enumerate(rows.lengths):
        tokens = rows.input_ids[rows.offsets[row] : rows.offsets[row + 1]]
        assert batch.input_ids[row, :length].tolist() == tokens.tolist()
        assert (batch.input_ids[row, length:] == 99).all()
        assert batch.attention_mask[row].sum() == length
        assert batch.weights[row, length:].sum() == 0
    assert batch.weights.sum() == pytest.approx(rows.loss_weights(prompt_weight).sum(), rel=1e-5)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.3]),
)
def test_the_positions_that_predict_are_those_before_what_counts(shapes, prompt_weight):
    rows = encoded(*[(range(prompt), range(completion)) for prompt, completion in shapes])
    batch = collate(rows, range(len(rows)), prompt_weight, pad_id=99)
    assert not batch.predicting[:, -1].any()
    assert (batch.predicting[:, :-1] == (batch.weights[:, 1:] > 0)).all()


def test_an_empty_micro_batch_counts_nothing():
    batch = collate(encoded(([1], [2])), [], 0.3, pad_id=0)
    assert batch.input_ids.shape == (1, 2)
    assert batch.weights.sum() == 0
    assert batch.predicting.sum() == 1
