"""Generated support tickets with their truth: train.csv and test.csv.

    python -m examples.tickets.generate OUT_DIR [--train 3000 --test 300 --seed 0]

Owns how a ticket is put together from ``phrases``: which parts it has, in what order, with
which typing mistakes. A test ticket says what matters in phrases that the training split has
never shown, with new words beside known ones and a new order number, so giving the answer
of the nearest training ticket fails; the same seed gives the same files.
"""

import argparse
import csv
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from examples.tickets import phrases
from examples.tickets.words import PRODUCTS, WORDS, Wording

Split = Literal["train", "test"]

NUM_WORDS = range(15, 46)
NO_ORDER = "none"
_ORDER_SIGNS = ("BCDFGHJKLM", "01234", "NPQRSVWXYZ", "56789")


@dataclass(frozen=True)
class Ticket:
    """One ticket and what a perfect answer says about it; the columns of the files."""

    ticket: str
    queue: str
    urgency: str
    product: str
    order_id: str


def make_splits(
    num_train: int = 3000, num_test: int = 300, seed: int = 0
) -> tuple[list[Ticket], list[Ticket]]:
    """Generate both splits. No ticket comes twice, no order number is in both.

    Each split depends only on its own size and the seed, so results for training sets of
    different sizes can be compared.
    """
    train = _take(num_train, "train", random.Random(f"train {seed}"))
    test = _take(num_test, "test", random.Random(f"test {seed}"))
    return train, test


def write_splits(
    folder: Path, num_train: int = 3000, num_test: int = 300, seed: int = 0
) -> tuple[Path, Path]:
    """Write train.csv and test.csv into ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.csv", folder / "test.csv"
    for path, tickets in zip(paths, make_splits(num_train, num_test, seed), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Ticket)])
            writer.writeheader()
            writer.writerows(asdict(ticket) for ticket in tickets)
    return paths


def read_tickets(path: Path) -> list[Ticket]:
    """Read a file that ``write_splits`` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Ticket(**row) for row in csv.DictReader(file)]


def _take(count: int, split: Split, rng: random.Random) -> list[Ticket]:
    tickets: dict[str, Ticket] = {}
    for ticket in _candidates(split, rng):
        if len(tickets) == count:
            break
        if len(ticket.ticket.split()) in NUM_WORDS:
            tickets.setdefault(ticket.ticket, ticket)
    return list(tickets.values())


def _candidates(split: Split, rng: random.Random) -> Iterator[Ticket]:
    while True:
        queue = rng.choice(sorted(phrases.PROBLEMS))
        urgency = rng.choices(("low", "normal", "high"), weights=(3, 4, 3))[0]
        product = rng.choice(PRODUCTS)
        order_id = _order_id(split, rng) if rng.random() < 0.75 else NO_ORDER
        text = _compose(queue, urgency, order_id != NO_ORDER, split, rng)
        text = text.replace("{product}", _mention(product, rng)).replace("{order}", order_id)
        yield Ticket(text, queue, urgency, product, order_id)


def _compose(queue: str, urgency: str, has_order: bool, split: Split, rng: random.Random) -> str:
    """A ticket's text in which only ``{product}`` and ``{order}`` are still to be filled."""

    def phrase(wording: Wording) -> str:
        return rng.choice(wording.seen if split == "train" else wording.held_out)

    def small_talk(wording: Wording) -> str:
        return rng.choice(_words(wording, split))

    body = [phrase(phrases.PROBLEMS[queue]), phrase(phrases.URGENCY[urgency])]
    subject = ""
    if has_order:
        # Some customers name the order in the subject too, some only there.
        where = rng.choices(("text", "subject", "both"), weights=(3, 2, 5))[0]
        if where != "text":
            subject = small_talk(phrases.SUBJECTS)
        if where != "subject":
            body.append(small_talk(phrases.ORDERS))
    if rng.random() < 0.75:
        body.append(phrase(phrases.REQUESTS[queue]))
    if rng.random() < 0.25:
        body.append(small_talk(phrases.MOODS))
    rng.shuffle(body)
    parts = [subject, small_talk(phrases.OPENERS) if rng.random() < 0.6 else "", *body]
    if rng.random() < 0.5:
        parts.append(f"{small_talk(phrases.CLOSINGS)} {small_talk(phrases.NAMES)}")
    text = _fill(" ".join(part for part in parts if part), split, rng)
    return _mistype(text, rng)


def _fill(text: str, split: Split, rng: random.Random) -> str:
    used: list[str] = []  # a ticket says each thing once, and then in other words

    def fill(slot: re.Match[str]) -> str:
        if slot[1] not in WORDS:
            return slot[0]
        wording = WORDS[slot[1]]
        words = [word for word in _words(wording, split) if word not in used]
        used.append(rng.choice(words or wording.seen))
        return used[-1]

    return re.sub(r"\{(\w+)\}", fill, text)


def _words(wording: Wording, split: Split) -> tuple[str, ...]:
    return wording.seen if split == "train" else wording.seen + wording.held_out


def _mention(product: str, rng: random.Random) -> str:
    colour = rng.choice(WORDS["colour"].seen)
    ways = (
        product,
        product.lower(),
        product.upper(),
        f"new {product}",
        f"{colour} {product}",
    )
    return rng.choices(ways, weights=(10, 5, 1, 2, 2))[0]


def _order_id(split: Split, rng: random.Random) -> str:
    """An order number such as B2-V8; every fifth one is kept for the test split.

    Each place has signs of its own, so that a small student learns from little data to copy
    a number it has never seen: telling equal digits apart by their place takes far longer.
    """
    while True:
        order_id = "{}{}-{}{}".format(*map(rng.choice, _ORDER_SIGNS))
        if (zlib.crc32(order_id.encode()) % 5 == 0) == (split == "test"):
            return order_id


def _mistype(text: str, rng: random.Random) -> str:
    """Lower-case one ticket in eight; mistype one long word in a quarter of them."""
    if rng.random() < 0.125:
        text = text.lower()
    words = text.split(" ")
    # Slots have braces, so products and order numbers stay as they are.
    long_words = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if long_words and rng.random() < 0.25:
        index = rng.choice(long_words)
        words[index] = _typo(words[index], rng)
    return " ".join(words)


def _typo(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 2)
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return rng.choice((swapped, word[:at] + word[at + 1 :], word[: at + 1] + word[at:]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate support tickets with their truth.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--train", type=int, default=3000, help="tickets to train on")
    parser.add_argument("--test", type=int, default=300, help="tickets held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, test = write_splits(args.out_dir, args.train, args.test, args.seed)
    print(f"{args.train} tickets in {train}, {args.test} in {test}")


if __name__ == "__main__":
    main()
