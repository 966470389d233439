"""Question answering, as in DSPy's guide to fine-tuning, on Ray.

    python -m examples.dspy_guide.question_answering           compile, save, answer
    python -m examples.dspy_guide.question_answering --load    in a new process: load, answer

What a DSPy user changes is marked (1) to (4); the rest is DSPy as it always was. The teacher
is a stand-in, see ``teacher``; the student a model of half a million parameters, trained from
scratch in seconds, that knows nothing but these questions.
"""

import argparse

import dspy

from distill import RayBootstrapFinetune  # (1) was: from dspy.teleprompt import BootstrapFinetune
from examples.dspy_guide.data import legs
from examples.dspy_guide.teacher import stand_in

SAVED, SAVED_WHOLE = "runs/finetuned_qa_model.json", "runs/finetuned_qa_program"


class TeacherQA(dspy.Module):
    """Thinks before it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.cot = dspy.ChainOfThought("question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        return self.cot(question=question)


def compile_and_save() -> None:
    """Fine-tune a student on what the teacher gets right, and save the program."""
    trainset, devset = legs()
    with stand_in([*trainset, *devset]) as lm:
        dspy.configure(lm=lm)
        optimizer = RayBootstrapFinetune(  # (2) was: BootstrapFinetune(
            metric=lambda gold, pred, trace=None: gold.answer == pred.answer,
            # (3) What the student starts from: this, or a Hugging Face model. It was the LM
            # of the program's predictors, set by hand, that a provider had to know.
            student_model="scratch",
            scratch={"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2},
            train_kwargs={
                "learning_rate": 2e-3,
                "num_train_epochs": 14,
                "per_device_train_batch_size": 8,
                "warmup_ratio": 0.1,
            },
        )
        finetuned = optimizer.compile(TeacherQA(), trainset=trainset)
    finetuned.save(SAVED)
    finetuned.save(SAVED_WHOLE, save_program=True)
    print(f"Saved to {SAVED}, and with its code to {SAVED_WHOLE}")
    right = sum(finetuned(**example.inputs()).answer == example.answer for example in devset)
    print(f"Held-out questions: {right} of {len(devset)} right")


def load_and_answer() -> None:
    """What a new process does; (4) it has imported ``distill``, which knows the student."""
    loaded = TeacherQA()
    loaded.load(SAVED)
    # No dspy.configure: the student's name was saved, and says where it is.
    for example in legs()[1][:3]:
        prediction = loaded(question=example.question)
        print(f"{example.question}\n  {prediction.reasoning}\n  {prediction.answer}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Question answering with a fine-tuned student.")
    parser.add_argument("--load", action="store_true", help="answer with what was saved before")
    if parser.parse_args().load:
        load_and_answer()
    else:
        compile_and_save()
