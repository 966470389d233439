"""Stored traces are scored anew: with threads of the metric's own, and stopped at any moment."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from distill.programs import Task
from distill.tracing.conductor import CallSettings
from distill.tracing.gate import Gate, Reply
from distill.tracing.governor import Governor
from distill.tracing.permits import Bounds
from distill.tracing.rescoring import Rescorer
from distill.tracing.spending import Spending
from distill.tracing.store import TraceStore
from distill.tracing.trace import METRIC, Trace, Usage
from tests import programs
from tests.lms import Asked

pytestmark = [
    pytest.mark.dspy,
    # DSPy 3.4 tells whoever calls such an LM that 3.5 will not have it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def says_good(text):
    return dspy.Predict(programs.Sentiment)(text=text).mood == "good"


def asking(example, prediction, trace=None):
    return says_good(example.text)


def asking_in_threads(example, prediction, trace=None):
    found = []
    thread = threading.Thread(target=lambda: found.append(says_good(example.text)))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(2) as pool:
        return all([*found, *pool.map(says_good, [example.text] * 2)])


def asking_another(example, prediction, trace=None):
    with dspy.context(lm=dspy.settings.cheap[0]["lm"]):
        return says_good(example.text)


@pytest.fixture
def scored(tmp_path):
    """Scores as many traces, two at once; returns them and what was spent."""

    def scored(number, metric, exchange, **settings):
        spending = Spending()
        task = Task(programs.build(), dspy.ChatAdapter(), metric, settings)
        rescorer = Rescorer(
            task,
            Asked([]),
            Gate(exchange),
            CallSettings(),
            TraceStore(str(tmp_path)),
            spending,
        )
        example = dspy.Example(text="sun", mood="good").with_inputs("text")
        traces = [
            Trace(str(each), str(each), (), {"mood": "good"}, Usage(), 0.0)
            for each in range(number)
        ]
        return rescorer.scored([(trace, example) for trace in traces], 2), spending

    return scored


def gates():
    return [thread for thread in threading.enumerate() if thread.name == "gate"]


def test_a_metric_may_ask_in_threads_of_its_own(scored):
    traces, spending = scored(3, asking_in_threads, Governor(Bounds()).exchange)
    assert [(trace.score.value, trace.score.error) for trace in traces] == 3 * [(1.0, None)]
    assert spending.by_predictor[METRIC].calls == 9


def test_an_lm_of_the_settings_is_paid_for_like_the_judge(scored):
    cheap = {"lm": Asked([])}
    traces, spending = scored(
        3, asking_another, Governor(Bounds()).exchange, cheap=(cheap, "cheap")
    )
    assert [trace.score.value for trace in traces] == 3 * [1.0]
    assert spending.by_predictor[METRIC].calls == 3
    assert type(cheap["lm"]) is Asked


@pytest.fixture
def interruptible():
    """As in a terminal: a process in the background is started to ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_it_though_the_metrics_calls_wait_for_a_permit(scored):
    interrupted = []

    def never(report):
        if report.asks and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return Reply([None for _ in report.asks], wait_s=0.01)

    traces, _ = scored(3, asking, never)
    with pytest.raises(KeyboardInterrupt):
        list(traces)


def test_nothing_of_it_stays_behind(scored):
    before = gates()
    traces, _ = scored(3, asking, Governor(Bounds(requests_per_minute=100)).exchange)
    list(traces)
    for thread in set(gates()) - set(before):
        thread.join(10)
    assert set(gates()) <= set(before)
