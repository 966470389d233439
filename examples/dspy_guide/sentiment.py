"""A sentiment classifier, scored on a devset before and after it is fine-tuned.

    python -m examples.dspy_guide.sentiment

Before, a stand-in for a large model answers; after, a student of half a million parameters.
"""

from typing import Literal

import dspy

from distill import RayBootstrapFinetune
from examples.dspy_guide.data import reviews
from examples.dspy_guide.teacher import stand_in


class Judge(dspy.Signature):
    """Say whether a restaurant review is positive, negative or mixed."""

    review: str = dspy.InputField()
    sentiment: Literal["positive", "negative", "mixed"] = dspy.OutputField()


def right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """The metric: it scores the devset, and chooses what the student learns from."""
    return example.sentiment == prediction.sentiment


def main() -> None:
    """Score, fine-tune, score again."""
    trainset, devset = reviews()
    evaluate = dspy.Evaluate(devset=devset, metric=right, num_threads=16)
    classify = dspy.Predict(Judge)
    with stand_in([*trainset, *devset]) as lm:
        dspy.configure(lm=lm)
        print(f"Before, the teacher: {evaluate(classify).score:.1f} % of the devset right")
        optimizer = RayBootstrapFinetune(
            metric=right,
            student_model="scratch",
            scratch={"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2},
            train_kwargs={
                "learning_rate": 2e-3,
                "num_train_epochs": 10,
                "per_device_train_batch_size": 8,
            },
            name="sentiment",
        )
        classify = optimizer.compile(classify, trainset=trainset)
    # The teacher is gone: from here on the student answers, in this process.
    print(f"After, the student: {evaluate(classify).score:.1f} % of the devset right")
    review = "The soup was superb, but the price was awful."
    print(f"{review} -> {classify(review=review).sentiment}")


if __name__ == "__main__":
    main()
