"""Small DSPy programs that the tests distill, one for each shape that programs take."""

import os
import resource
import threading
from typing import Literal

import dspy

FILE_LIMIT = "TESTS_FILE_LIMIT_BYTES"
"""Environment: the largest file that ``OnASmallDisk`` lets its process write."""


class Sentiment(dspy.Signature):
    """Judge the mood of a text."""

    text: str = dspy.InputField()
    mood: Literal["good", "bad"] = dspy.OutputField()


class Reply(dspy.Signature):
    """Answer the text."""

    text: str = dspy.InputField()
    mood: str = dspy.InputField()
    reply: str = dspy.OutputField()


class TwoSteps(dspy.Module):
    """Calls its predictors in another order than it declares them in."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict(Reply)
        self.judge = dspy.Predict(Sentiment)

    def forward(self, text):
        mood = self.judge(text=text).mood
        return dspy.Prediction(mood=mood, reply=self.answer(text=text, mood=mood).reply)


class Connected(TwoSteps):
    """Needs a client that no other process can be sent: ``connect`` makes it."""

    def __init__(self):
        super().__init__()
        self.client = None

    def forward(self, text):
        with self.client:
            return super().forward(text=text)


def connect(program):
    """The setup hook of ``Connected``."""
    program.client = threading.Lock()


def connect_in_vain(program):
    raise ConnectionRefusedError("nobody listens")


class Loop(dspy.Module):
    """Calls one predictor several times, on a copy as DSPy's own retries do."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)

    def forward(self, text):
        moods = [self.judge.deepcopy()(text=part).mood for part in text.split(",")]
        return dspy.Prediction(mood=moods[-1], moods=moods)


class Async(dspy.Module):
    """Defines only aforward."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)

    async def aforward(self, text):
        return await self.judge.acall(text=text)


class Retrieving(dspy.Module):
    """Looks a passage up before it asks."""

    def __init__(self, passages=("the sun shines", "it rains")):
        super().__init__()
        self.passages = passages
        self.judge = dspy.Predict("passage, text -> mood")

    def forward(self, text):
        passage = self.passages[len(text) % len(self.passages)]
        return self.judge(passage=passage, text=text)


class Raising(dspy.Module):
    """Raises on some texts."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)

    def forward(self, text):
        if "boom" in text:
            raise ValueError(f"cannot handle {text}")
        return self.judge(text=text)


class OnASmallDisk(dspy.Module):
    """Has its process fail to write as on a full disk, where the environment says so."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)

    def forward(self, text):
        if FILE_LIMIT in os.environ:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ[FILE_LIMIT]), most))
        return self.judge(text=text)


class Unpicklable(dspy.Module):
    """Holds a lock, which no other process can be sent."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)
        self.lock = threading.Lock()

    def forward(self, text):
        return self.judge(text=text)


def build():
    return dspy.Predict(Sentiment)


def build_two_steps():
    return TwoSteps()


def build_connected():
    return Connected()


def build_raising():
    return Raising()


def build_on_a_small_disk():
    return OnASmallDisk()


def build_unpicklable():
    return Unpicklable()


def build_broken():
    raise RuntimeError("no such client")


def not_a_program():
    return "text"


def right_mood(example, prediction, trace=None):
    return example.mood == prediction.mood


def broken_metric(example, prediction, trace=None):
    raise KeyError("label")


not_callable = 3
