"""A classifier that looks things up first: retrieval, then one predictor.

    python -m examples.dspy_guide.rag                      a retriever of one's own
    python -m examples.dspy_guide.rag --dspy-retrieve      dspy.Retrieve and settings.rm

The devset asks about things that the trainset does not mention, so the student cannot know
their rules: it has to read what was retrieved. Any callable will do as a retriever, as long
as it can be pickled, since the teacher is run in Ray's workers.
"""

import argparse
import re
from collections.abc import Callable
from typing import Literal

import dspy

from distill import RayBootstrapFinetune
from examples.dspy_guide.data import passages, returns
from examples.dspy_guide.teacher import stand_in


class WordOverlap:
    """Finds the passages that share most words with a query."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __call__(self, query: str, k: int = 1) -> list[str]:
        wanted = _words(query)
        return sorted(self.texts, key=lambda text: -len(wanted & _words(text)))[:k]


class OverlapModel(WordOverlap):
    """The same for ``dspy.settings.rm``, whose results have a ``long_text``."""

    def __call__(self, query: str, k: int = 1) -> list[dspy.Example]:
        return [dspy.Example(long_text=text) for text in super().__call__(query, k)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


class Verdict(dspy.Signature):
    """Say what the shop's rules mean for a customer who wants to return something."""

    context: list[str] = dspy.InputField(desc="the rules that may apply, the likeliest first")
    question: str = dspy.InputField()
    verdict: Literal["free", "paid", "final"] = dspy.OutputField()


class ReturnsDesk(dspy.Module):
    """question -> verdict, by way of the passages that ``retrieve`` finds."""

    def __init__(self, retrieve: Callable) -> None:
        super().__init__()
        self.retrieve = retrieve
        self.judge = dspy.Predict(Verdict)

    def forward(self, question: str) -> dspy.Prediction:
        found = self.retrieve(question)
        # dspy.Retrieve wraps them, a plain retriever does not.
        context = found if isinstance(found, list) else found.passages
        return self.judge(context=context, question=question)


def right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """The metric."""
    return example.verdict == prediction.verdict


def main(use_dspy_retrieve: bool) -> None:
    """Score, fine-tune, score again."""
    trainset, devset = returns()
    evaluate = dspy.Evaluate(devset=devset, metric=right, num_threads=16)
    if use_dspy_retrieve:
        dspy.configure(rm=OverlapModel(passages()))
        desk = ReturnsDesk(dspy.Retrieve(k=1))
    else:
        desk = ReturnsDesk(WordOverlap(passages()))
    with stand_in([*trainset, *devset]) as lm:
        dspy.configure(lm=lm)
        print(f"Before, the teacher: {evaluate(desk).score:.1f} % of the devset right")
        optimizer = RayBootstrapFinetune(
            metric=right,
            student_model="scratch",
            scratch={"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2},
            train_kwargs={
                "learning_rate": 2e-3,
                "num_train_epochs": 12,
                "per_device_train_batch_size": 4,
            },
        )
        desk = optimizer.compile(desk, trainset=trainset)
    print(f"After, the student: {evaluate(desk).score:.1f} % of the devset right")
    question = devset[0].question
    print(f"{question} -> {desk(question=question).verdict}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A classifier over retrieved passages.")
    parser.add_argument("--dspy-retrieve", action="store_true", help="retrieve as DSPy does")
    main(parser.parse_args().dspy_retrieve)
