"""A cluster of Ray nodes on this machine, and a run on it."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.runs import ROOT, environment


@pytest.fixture
def cluster(monkeypatch):
    """A head without room for actors; the nodes that have some are the test's to add."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def start(cluster, tmp_path):
    """Starts tracing so many texts with at least so many actors."""

    def start(server, count, actors):
        script = Path(__file__).parent / "traced_run.py"
        arguments = [cluster.address, server.api_base, str(tmp_path), str(count), str(actors)]
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=ROOT,
            env={**environment(), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
