"""What the optimizer's tests ask a teacher through; a module may have its own instead."""

import pytest
import ray

from examples.standin_teacher import serve_in_background
from tests.optimizing import Oracle, make_lm


@pytest.fixture(scope="module")
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def oracle():
    return Oracle()


@pytest.fixture
def server(oracle):
    with serve_in_background(oracle) as server:
        yield server


@pytest.fixture
def lm(server):
    return make_lm(server)
