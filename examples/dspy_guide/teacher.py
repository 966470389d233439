"""The stand-in for the large model that a DSPy user would have: a local server, no model.

It answers the generated examples with their labels, except that it takes one in 25 for
another one. With a real model all of this is ``dspy.configure(lm=dspy.LM("openai/gpt-4o"))``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dspy

from examples.chat_prompts import read_prompt
from examples.standin_teacher import StandInTeacher, TeacherRefuses, serve_in_background

API_KEY = "stand-in-api-key"
"""Checked by nobody; the tests look for it in all that a compile leaves behind."""

MISTAKEN = 25


@contextmanager
def stand_in(examples: Sequence[dspy.Example]) -> Iterator[dspy.LM]:
    """A teacher LM that knows these examples; its server runs until the block ends."""
    told = [example.labels().toDict() for example in examples]
    replies = {}
    for number, (example, labels) in enumerate(zip(examples, told, strict=True)):
        if number % MISTAKEN == 0:
            labels = next(other for other in told if other != labels)
        [text] = example.inputs().values()
        replies[text] = labels

    def answer(messages: list[dict]) -> str:
        prompt = read_prompt(messages)
        for text in prompt.inputs.values():
            if text in replies:
                return prompt.reply(replies[text])
        raise TeacherRefuses(400, "the stand-in teacher knows only the generated examples")

    with serve_in_background(StandInTeacher(answer)) as server:
        # Uncached: whoever runs another example later must not meet this one's answers.
        yield dspy.LM(
            "openai/stand-in-teacher", api_base=server.api_base, api_key=API_KEY, cache=False
        )
