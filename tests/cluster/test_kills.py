"""A driver, an actor and a node are killed half-way: what is lost is what was in flight."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from examples.standin_teacher import serve_in_background
from tests.cluster.traced_run import make_job
from tests.runs import ROOT, MoodTeacher, environment

pytestmark = pytest.mark.cluster

COUNT, IN_FLIGHT, SPARE = 2_000, 32, 8


@pytest.fixture
def cluster(monkeypatch):
    """Three nodes, two of which have room for an actor each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def start(cluster, server, folder):
    script = Path(__file__).parent / "traced_run.py"
    command = [sys.executable, str(script), cluster.address, server.api_base, str(folder)]
    return subprocess.Popen(
        [*command, str(COUNT)],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_driver(cluster, driver, folder):
    driver.kill()


def kill_actor(cluster, driver, folder):
    for file in folder.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.stem), signal.SIGKILL)
            return


def kill_node(cluster, driver, folder):
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)


@pytest.mark.parametrize("kill", [kill_driver, kill_actor, kill_node])
def test_a_kill_costs_no_more_than_what_was_in_flight(cluster, tmp_path, kill):
    teacher = MoodTeacher(latency_s=0.05)
    with serve_in_background(teacher) as server:
        with start(cluster, server, tmp_path) as driver:
            while teacher.calls < COUNT / 2:
                assert driver.poll() is None, driver.stdout.read()
                time.sleep(0.01)
            kill(cluster, driver, tmp_path)
            output, _ = driver.communicate(timeout=300)
            assert (driver.returncode == 0) is (kill is not kill_driver), output
        with start(cluster, server, tmp_path) as again:
            output, _ = again.communicate(timeout=300)
            assert again.returncode == 0, output
        job = make_job(server.api_base, str(tmp_path), COUNT)
        assert sum(trace.failure is None for trace in job.traces()) == COUNT
        assert COUNT <= teacher.calls <= COUNT + IN_FLIGHT + SPARE
    assert not ray.is_initialized()
