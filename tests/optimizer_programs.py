"""Programs that the tests of the optimizer compile, and a teacher that can answer them all.

``tests.programs`` has those that the other tests run; how the optimizer is called is
``tests.optimizing``.
"""

from collections.abc import Callable
from typing import Any, Literal

import dspy
import pydantic

from tests.programs import Sentiment


class Pipeline(dspy.Module):
    """Calls its two predictors in the order in which it declares them."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)
        self.answer = dspy.ChainOfThought("text, mood -> reply")

    def forward(self, text):
        mood = self.judge(text=text).mood
        return self.answer(text=text, mood=mood)


class Backwards(dspy.Module):
    """Calls its predictors in the other order, the last as often as the text has words."""

    def __init__(self):
        super().__init__()
        self.gather = dspy.Predict("words -> summary")
        self.spell = dspy.Predict("word -> spelling")

    def forward(self, text):
        words = [self.spell(word=word).spelling for word in text.split()]
        return self.gather(words=" ".join(words))


class Person(pydantic.BaseModel):
    """A value with structure."""

    name: str
    age: int
    nicknames: list[str] = []


class Typed(dspy.Module):
    """Has an output of each kind of type."""

    def __init__(self):
        super().__init__()
        fields = {
            "text": (str, dspy.InputField()),
            "mood": (Literal["good", "bad"], dspy.OutputField()),
            "tags": (list[str], dspy.OutputField()),
            "person": (Person, dspy.OutputField()),
            "count": (int, dspy.OutputField()),
            "sure": (bool, dspy.OutputField()),
            "rest": (dict[str, float], dspy.OutputField()),
        }
        self.extract = dspy.Predict(dspy.Signature(fields, "Take the text apart."))
        self.greet = dspy.Predict(
            dspy.Signature(
                {
                    "person": (Person, dspy.InputField()),
                    "tags": (list[str], dspy.InputField()),
                    "greeting": (str, dspy.OutputField()),
                }
            )
        )

    def forward(self, text):
        found = self.extract(text=text)
        greeting = self.greet(person=found.person, tags=found.tags).greeting
        return dspy.Prediction(greeting=greeting, **dict(found.items()))


class Many(dspy.Module):
    """Forty predictors, called in an order of the text's own, some of them not at all."""

    SIZE = 40

    def __init__(self):
        super().__init__()
        self.steps = [dspy.Predict(f"text -> out{index}") for index in range(self.SIZE)]

    @classmethod
    def order(cls, text: str) -> list[int]:
        """The predictors that a text calls, in that order: three in four, scrambled."""
        start = int(text.split()[-1])
        # 7 and 40 have no divisor in common, so this meets every predictor once.
        scrambled = [(start + 7 * step) % cls.SIZE for step in range(cls.SIZE)]
        return [index for index in scrambled if (index + start) % 4]

    def forward(self, text):
        answers = {}
        for index in self.order(text):
            answers |= self.steps[index](text=text).toDict()
        return dspy.Prediction(**answers)


class TenSteps(dspy.Module):
    """Feeds one predictor its own answer, ten times."""

    def __init__(self):
        super().__init__()
        self.polish = dspy.Predict("draft -> final")
        self.step = dspy.Predict("number, text -> next")

    def forward(self, text):
        for number in range(10):
            text = self.step(number=str(number), text=text).next
        return self.polish(draft=text)


class Branching(dspy.Module):
    """Asks one of two predictors, and the third in a loop."""

    def __init__(self):
        super().__init__()
        self.deny = dspy.Predict("text -> denial")
        self.praise = dspy.Predict("text -> compliment")
        self.judge = dspy.Predict(Sentiment)

    def forward(self, text):
        moods = [self.judge(text=part).mood for part in text.split(",")]
        chosen = self.praise if "good" in moods else self.deny
        return chosen(text=text)


class Inner(dspy.Module):
    """A module to be held by others."""

    def __init__(self, output):
        super().__init__()
        self.think = dspy.ChainOfThought(f"text -> {output}")

    def forward(self, text):
        return self.think(text=text)


class Nested(dspy.Module):
    """Holds modules in a list, in a dict and in another module."""

    def __init__(self):
        super().__init__()
        self.listed = [Inner("first"), Inner("second")]
        self.named = {"left": Inner("third"), "right": dspy.Predict("text -> fourth")}
        self.deep = Inner("fifth")
        self.deep.helper = Inner("sixth")

    def forward(self, text):
        modules = [self.deep.helper, *self.named.values(), self.deep, *reversed(self.listed)]
        return dspy.Prediction(
            **{name: value for module in modules for name, value in module(text=text).items()}
        )


class Twins(dspy.Module):
    """One predictor was made from the other, and both are copied before they are called."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("text -> better")
        self.second = self.first.deepcopy()

    def forward(self, text):
        text = self.first.deepcopy()(text=text).better
        return self.second.deepcopy()(text=text)


class Fanned(dspy.Module):
    """Asks one predictor several things side by side."""

    def __init__(self):
        super().__init__()
        self.judge = dspy.Predict(Sentiment)
        self.answer = dspy.Predict("moods -> reply")

    def forward(self, text):
        asked = [(self.judge, {"text": part}) for part in text.split(",")]
        found = dspy.Parallel(num_threads=4, disable_progress_bar=True)(asked)
        return self.answer(moods=" ".join(each.mood for each in found))


class AsyncSteps(dspy.Module):
    """Only has ``aforward``, and waits for two predictors."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.ChainOfThought("text, mood -> reply")
        self.judge = dspy.Predict(Sentiment)

    async def aforward(self, text):
        mood = (await self.judge.acall(text=text)).mood
        return await self.answer.acall(text=text, mood=mood)


PASSAGES = ("the sun shines on Monday", "it rains on Tuesday", "fog comes on Wednesday")


class Passage(dict):
    """What DSPy's retriever models return."""

    @property
    def long_text(self):
        return self["long_text"]


def search(query: str, k: int = 3, **_: Any) -> list[Passage]:
    """The passages with the most letters of the query in them: ``dspy.settings.rm``'s face."""

    def distance(passage: str) -> int:
        return -sum(letter in passage for letter in query)

    return [Passage(long_text=passage) for passage in sorted(PASSAGES, key=distance)[:k]]


class Rag(dspy.Module):
    """Answers from passages that a retriever finds; None is DSPy's configured one."""

    def __init__(self, retrieve: Callable[..., Any] | None = None):
        super().__init__()
        self.retrieve = retrieve or dspy.Retrieve(k=2)
        self.answer = dspy.ChainOfThought("context: list[str], question -> answer")

    def forward(self, question):
        found = self.retrieve(question)
        context = found.passages if hasattr(found, "passages") else list(found)
        return self.answer(context=context, question=question)


def lookup(city: str) -> str:
    """The weather of a city."""
    if city == "Atlantis":
        raise LookupError("no such city")
    return f"{city} is sunny"


def agent():
    """An agent with a tool; the second question's tool call fails, and is data as well."""
    return dspy.ReAct("question -> answer", tools=[lookup], max_iters=4)
