"""The examples' data, generated: questions about legs, restaurant reviews, a shop's returns.

Owns what is true. Each function gives a trainset and a devset of ``dspy.Example`` that share
no example, the same at every call; who answers them is in ``teacher``.
"""

import itertools
import random

import dspy

Split = tuple[list[dspy.Example], list[dspy.Example]]

_LEGS = {
    2: ("hens", "owls", "geese", "ducks"),
    4: ("dogs", "cats", "cows", "frogs"),
    6: ("ants", "bees", "moths", "wasps"),
    8: ("spiders", "scorpions", "ticks", "mites"),
}
_LEG_QUESTIONS = (
    "How many legs do {count} {animals} have?",
    "{count} {animals} pass by. How many legs is that?",
    "Count the legs of {count} {animals}.",
    "I see {count} {animals}. How many legs do I see?",
)


def legs(num_train: int = 400, num_dev: int = 60) -> Split:
    """Questions that take one fact and one multiplication.

    Fields: question; answer, and the reasoning that leads to it.
    """
    rng = random.Random("legs")
    examples = [
        dspy.Example(
            question=words.format(count=count, animals=animals),
            reasoning=f"{animals} have {each} legs, {count} times {each} is {count * each}.",
            answer=str(count * each),
        )
        for each, kinds in _LEGS.items()
        for animals, count, words in itertools.product(kinds, range(2, 10), _LEG_QUESTIONS)
    ]
    rng.shuffle(examples)
    return _split(examples, num_train, num_dev, "question")


_THINGS = ("soup", "bread", "fish", "cake", "coffee", "waiter", "music", "room", "view", "price")
_GOOD = ("good", "lovely", "great", "superb", "pleasant", "delightful")
_BAD = ("bad", "awful", "poor", "terrible", "dreadful", "disappointing")
_DEGREES = ("", "really ", "quite ", "rather ")


def reviews(num_train: int = 400, num_dev: int = 100) -> Split:
    """Reviews that speak of two things; praise for one and blame for the other is mixed.

    Fields: review; sentiment.
    """
    rng = random.Random("reviews")
    examples: dict[str, dspy.Example] = {}
    while len(examples) < num_train + num_dev:
        things, likes = rng.sample(_THINGS, 2), rng.choices((True, False), k=2)
        first, second = (_clause(*said, rng) for said in zip(things, likes, strict=True))
        text = f"{first}{rng.choice((', ', ' and ', ' but ', '; '))}{second}."
        sentiment = "positive" if all(likes) else "mixed" if any(likes) else "negative"
        examples[text] = dspy.Example(review=text.capitalize(), sentiment=sentiment)
    return _split(list(examples.values()), num_train, num_dev, "review")


def _clause(thing: str, likes: bool, rng: random.Random) -> str:
    return f"the {thing} was {rng.choice(_DEGREES)}{rng.choice(_GOOD if likes else _BAD)}"


_KINDS = ("steel", "glass", "oak", "blue", "small", "used")
_GOODS = ("kettle", "lamp", "chair", "mirror", "vase", "clock", "bowl", "stool", "box", "tray")
# None of their words occurs in a question, so that a thing's name alone finds its rule.
_RULES = {
    "free": (
        "returned free of charge within {days} days",
        "collected at our cost during {days} days",
    ),
    "paid": (
        "returned within {days} days at customers' expense",
        "collected during {days} days, buyers pay postage",
    ),
    "final": (
        "excluded from returns for hygiene reasons",
        "sold for good, all sales are final",
    ),
}
_RETURN_QUESTIONS = (
    "Can I send back my {item}?",
    "I no longer want the {item}. What now?",
    "Who pays if I return a {item}?",
    "The {item} does not please me. Will you take it?",
)


def passages() -> list[str]:
    """The shop's rules, one for each thing that it sells."""
    return [f"{item}: {rule}" for item, (rule, _) in _rules().items()]


def returns() -> Split:
    """Questions about returning a thing; the devset's things do not occur in the trainset.

    Fields: question; verdict, which follows from the thing's rule alone.
    """
    examples = [
        dspy.Example(question=words.format(item=item), verdict=verdict)
        for item, (_, verdict) in _rules().items()
        for words in _RETURN_QUESTIONS
    ]
    num_dev = len(_RETURN_QUESTIONS) * 15
    return _split(examples, len(examples) - num_dev, num_dev, "question")


def _rules() -> dict[str, tuple[str, str]]:
    """Thing -> its rule, and the verdict that this means."""
    rng = random.Random("returns")
    items = [f"{kind} {thing}" for kind in _KINDS for thing in _GOODS]
    rng.shuffle(items)
    rules = {}
    for item, verdict in zip(items, itertools.cycle(_RULES), strict=False):
        rule = rng.choice(_RULES[verdict])
        rules[item] = rule.format(days=rng.choice((14, 30, 60))), verdict
    return rules


def _split(examples: list[dspy.Example], num_train: int, num_dev: int, field: str) -> Split:
    ready = [example.with_inputs(field) for example in examples[: num_train + num_dev]]
    return ready[:num_train], ready[num_train:]
