"""A cluster grows while a run is at work on it."""

import time

import pytest

from examples.standin_teacher import serve_in_background
from tests.cluster.traced_run import make_job
from tests.runs import MoodTeacher

pytestmark = pytest.mark.cluster

COUNT = 2_000


def test_a_node_that_joins_is_used_while_the_run_goes_on(cluster, start, tmp_path):
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    teacher = MoodTeacher(latency_s=0.1)
    with serve_in_background(teacher) as server, start(server, COUNT, actors=1) as driver:
        while teacher.calls < 100:
            assert driver.poll() is None, driver.stdout.read()
            time.sleep(0.01)
        assert len(list(tmp_path.glob("*.pid"))) == 1
        cluster.add_node(num_cpus=1)
        output, _ = driver.communicate(timeout=300)
        assert driver.returncode == 0, output
        job = make_job(server.api_base, str(tmp_path), COUNT)
        assert sum(trace.failure is None for trace in job.traces()) == COUNT
    assert len(list(tmp_path.glob("*.pid"))) == 2
    assert teacher.calls == COUNT
