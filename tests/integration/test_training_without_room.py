"""What becomes of training whose lost workers find no room to start again."""

import pytest
import ray
from ray.util.placement_group import placement_group_table

from serve.errors import TrainingCancelled
from tests.integration.test_training_chosen import kill_a_worker
from tests.training_runs import run, write_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

SETTINGS = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 10, "num_train_epochs": 2}


@ray.remote(num_cpus=1)
class Tenant:
    """Takes the CPU of a worker that is lost."""

    def is_there(self):
        return True


class Eviction:
    """Kills a worker after some steps, whose room is then another's."""

    def __init__(self):
        self.starts, self.tenant, self.waits = [], None, []

    def note(self, event):
        if event["event"] == "train_start":
            self.starts.append(event["step"])
        if event["event"] == "train_step" and event["step"] >= 4 and self.tenant is None:
            self.tenant = Tenant.remote()
            kill_a_worker()

    def wait(self, words):
        assert ray.get(self.tenant.is_there.remote())
        self.waits.append(words)

    def leave(self, words):
        self.wait(words)
        ray.kill(self.tenant)


def test_lost_workers_that_find_no_room_say_so_and_go_on_once_there_is_some(tmp_path):
    write_rows(tmp_path / "whole", num_rows=400)
    write_rows(tmp_path / "evicted", num_rows=400)
    whole = run(tmp_path / "whole", **SETTINGS)
    eviction = Eviction()
    again = run(tmp_path / "evicted", on_event=eviction.note, on_wait=eviction.leave, **SETTINGS)
    assert len(eviction.waits) == 1
    assert "free are 1 of 2 CPU" in eviction.waits[0]
    assert len(eviction.starts) == 2
    assert [epoch["train_loss"] for epoch in again.history] == [
        epoch["train_loss"] for epoch in whole.history
    ]


def test_training_is_cancelled_while_its_lost_workers_find_no_room(tmp_path):
    write_rows(tmp_path, num_rows=400)
    eviction = Eviction()
    with pytest.raises(TrainingCancelled):
        run(
            tmp_path,
            on_event=eviction.note,
            on_wait=eviction.wait,
            cancelled=lambda: bool(eviction.waits),
            **SETTINGS,
        )
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    ray.kill(eviction.tenant)
