"""A whole run with a teacher that fails in every way at once: nothing is lost, no limit passed."""

import asyncio
import json
import time
from collections import Counter

import pytest

from examples.chat_prompts import read_prompt
from examples.standin_teacher import TeacherRefuses, serve_in_background
from tests.runs import MoodTeacher, RunFolder

pytestmark = pytest.mark.integration

PER_MINUTE = 130
TRAIN, TEST = 120, 20
BURST_S = 0.5


def is_unusable(text):
    """Of every twentieth text the teacher will not speak."""
    return int(text.split()[1]) % 20 == 7


class FaultyTeacher(MoodTeacher):
    """Of a hundred requests 5 end in HTTP 500 and 1 hangs; every sixtieth begins a burst of 429."""

    def __init__(self):
        super().__init__(latency_s=0.02)
        self.times, self.said = [], Counter()
        self.closed_until = 0.0

    async def _complete(self, request):
        self.times.append(time.monotonic())
        if len(self.times) % 100 == 50:
            self.said["nothing"] += 1
            await asyncio.sleep(3600)
        return await super()._complete(request)

    def _reply(self, messages):
        now = time.monotonic()
        if self.said.total() % 60 == 59:
            self.closed_until = now + BURST_S
        if now < self.closed_until:
            self._refuse(429, retry_after=1)
        if (self.said["reply"] + self.said[500]) % 20 == 3:
            self._refuse(500)
        self.said["reply"] += 1
        if is_unusable(read_prompt(messages).inputs["text"]):
            return "I would rather not say."
        return super()._reply(messages)

    def _refuse(self, status, retry_after=None):
        self.said[status] += 1
        raise TeacherRefuses(status, "not now", retry_after)


def test_a_run_with_a_faulty_teacher_accounts_for_all_and_keeps_the_limit(tmp_path):
    teacher = FaultyTeacher()
    limits = {"requests_per_minute": PER_MINUTE, "call_timeout_s": 5.0, "max_retries": 3}
    with serve_in_background(teacher) as server:
        changes = {"trace": {"concurrency": 16, **limits}}
        folder = RunFolder(tmp_path, server.api_base, changes)
        folder.write_csv("train.csv", TRAIN)
        folder.write_csv("test.csv", TEST, start=1000)
        process = folder.raydistill("run")
        assert process.returncode == 0, process.stdout
    assert all(teacher.said[what] for what in (429, 500, "nothing")), teacher.said
    check_limit(teacher.times)
    report = json.loads((folder.run_dir / "report.json").read_text())
    tracing, arm = report["tracing"], report["arms"]["teacher"]
    assert tracing["examples"] == TRAIN
    assert tracing["rejected"] == {"metric": 0, "parse": TRAIN // 20, "error": 0}
    assert tracing["kept"] == TRAIN - TRAIN // 20
    assert (arm["n"], arm["parse_failures"], arm["errors"]) == (TEST, TEST // 20, 0)
    # DSPy asks once more, for JSON, where it could not read a reply.
    assert tracing["teacher_calls"] == TRAIN + TRAIN // 20
    assert teacher.said["reply"] == tracing["teacher_calls"] + TEST + TEST // 20


def check_limit(times):
    """The requests that arrived in each minute, told and counted by the teacher."""
    assert len(times) > PER_MINUTE
    for start in times:
        assert sum(start <= time < start + 60 for time in times) <= PER_MINUTE
