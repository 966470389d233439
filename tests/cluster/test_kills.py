"""A driver, an actor and a node are killed half-way: what is lost is what was in flight."""

import contextlib
import os
import signal
import time

import pytest
import ray

from examples.standin_teacher import serve_in_background
from tests.cluster.traced_run import make_job
from tests.runs import MoodTeacher

pytestmark = pytest.mark.cluster

COUNT, IN_FLIGHT, SPARE = 2_000, 32, 8


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
def test_a_kill_costs_no_more_than_what_was_in_flight(cluster, start, tmp_path, kill):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    teacher = MoodTeacher(latency_s=0.05)
    with serve_in_background(teacher) as server:
        with start(server, COUNT, actors=2) as driver:
            while teacher.calls < COUNT / 2:
                assert driver.poll() is None, driver.stdout.read()
                time.sleep(0.01)
            kill(cluster, driver, tmp_path)
            output, _ = driver.communicate(timeout=300)
            assert (driver.returncode == 0) is (kill is not kill_driver), output
        with start(server, COUNT, actors=2) as again:
            output, _ = again.communicate(timeout=300)
            assert again.returncode == 0, output
        job = make_job(server.api_base, str(tmp_path), COUNT)
        assert sum(trace.failure is None for trace in job.traces()) == COUNT
        assert COUNT <= teacher.calls <= COUNT + IN_FLIGHT + SPARE
    assert not ray.is_initialized()
