"""Several trainings of one process on one cluster: side by side, or one after another."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from distill.training.room import my_turn, num_jobs
from serve.errors import ConfigurationError
from tests.training_runs import never, run, write_rows

pytestmark = pytest.mark.integration


def train_two(folder, together):
    """Two jobs of two workers each; returns the order of their starts and ends."""
    order, both = [], threading.Barrier(2)

    def train(number):
        write_rows(folder / str(number))

        def note(event):
            if event["event"] == "train_start":
                order.append(("start", number))
                if together:
                    both.wait(120)

        run(folder / str(number), on_event=note, num_train_epochs=1)
        order.append(("end", number))

    with ThreadPoolExecutor(2) as pool:
        # Neither takes room before the other is there to share it with.
        with my_turn(never):
            jobs = [pool.submit(train, number) for number in range(2)]
            deadline = time.monotonic() + 60
            while num_jobs() < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        for job in jobs:
            job.result()
    return [what for what, _ in order]


def test_two_jobs_train_side_by_side_where_there_is_room_for_both(tmp_path):
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        # Each waits, once it has started, until the other has.
        order = train_two(tmp_path, together=True)
    finally:
        ray.shutdown()
    assert order == ["start", "start", "end", "end"]


def test_two_jobs_train_one_after_another_where_there_is_room_for_one(tmp_path):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        order = train_two(tmp_path, together=False)
        write_rows(tmp_path / "large")
        with pytest.raises(ConfigurationError, match=r"num_workers=3 needs 1 CPU each"):
            run(tmp_path / "large", num_workers=3)
    finally:
        ray.shutdown()
    assert order.count("start") == order.count("end") == 2
