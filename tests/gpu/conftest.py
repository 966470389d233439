"""Every test here needs a GPU, and is skipped where there is none."""

import pytest
import ray
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module")
def gpus():
    """A Ray of this machine's GPUs; says how many there are."""
    ray.init(include_dashboard=False, log_to_driver=False)
    yield int(ray.cluster_resources()["GPU"])
    ray.shutdown()
