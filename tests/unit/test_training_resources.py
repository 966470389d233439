import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.training.resources import cpus_per_worker


@pytest.mark.parametrize(
    ("node_cpus", "num_workers", "expected"),
    [([2], 2, 1), ([2], 1, 2), ([8, 8], 2, 8), ([8, 8], 3, 4), ([16, 4], 5, 4), ([1], 4, 1)],
)
def test_workers_share_the_cpus_of_their_nodes(node_cpus, num_workers, expected):
    assert cpus_per_worker(node_cpus, num_workers) == expected


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.integers(1, 64))
def test_all_workers_fit_at_the_same_time_if_any_share_lets_them(node_cpus, num_workers):
    cpus = cpus_per_worker(node_cpus, num_workers)
    places = sum(node // cpus for node in node_cpus)
    assert places >= min(num_workers, sum(node_cpus))
