"""The stand-in teacher of the support desk: generated truth, told with mistakes.

    python -m examples.tickets.teacher --data DIR [--port 8100] [--latency-ms 20]

It looks a ticket up in DIR's train.csv and test.csv, and errs the way a large model does:
in about 4 of 100 tickets it confuses two queues or neighbouring urgencies, in 1 it copies
the product or the order wrongly, and 1 reply in 200 ignores the format. Which ones depends
on the ticket's text alone, so every run sees the same mistakes.
"""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

from examples.chat_prompts import read_prompt
from examples.standin_teacher import (
    Answer,
    StandInTeacher,
    TeacherRefuses,
    serve_forever,
)
from examples.tickets.generate import NO_ORDER, Ticket, read_tickets

WRONG_QUEUE = 0.02
WRONG_URGENCY = 0.02
WRONG_EXTRACTION = 0.01
IGNORED_FORMAT = 0.005

_MISTAKEN_QUEUE = {
    "account": "technical",
    "billing": "account",
    "delivery": "billing",
    "returns": "delivery",
    "technical": "returns",
}


def make_answer(tickets: Iterable[Ticket]) -> Answer:
    """An ``answer`` function that knows these tickets and no others."""
    known = {ticket.ticket: ticket for ticket in tickets}

    def answer(messages: list[dict]) -> str:
        prompt = read_prompt(messages)
        ticket = known.get(prompt.inputs.get("ticket", ""))
        if ticket is None:
            raise TeacherRefuses(400, "the stand-in teacher knows only the generated tickets")
        if _chance(ticket, f"format {prompt.outputs}") < IGNORED_FORMAT:
            return f"Sounds like something for the {ticket.queue} team, I would say."
        return prompt.reply(_answers(ticket))

    return answer


def _answers(ticket: Ticket) -> dict[str, str]:
    queue, urgency = ticket.queue, ticket.urgency
    if _chance(ticket, "queue") < WRONG_QUEUE:
        queue = _MISTAKEN_QUEUE[queue]
    if _chance(ticket, "urgency") < WRONG_URGENCY:
        urgency = "low" if urgency == "normal" else "normal"
    product, order_id = ticket.product, ticket.order_id
    if _chance(ticket, "extraction") < WRONG_EXTRACTION:
        if order_id == NO_ORDER:
            product = product.split()[-1]
        else:
            order_id = order_id[:-1]
    return {
        "queue": queue,
        "urgency": urgency,
        "product": product,
        "order_id": order_id,
    }


def _chance(ticket: Ticket, purpose: str) -> float:
    """A number in [0, 1) that is always the same for this ticket and purpose."""
    digest = hashlib.sha256(f"{purpose}\n{ticket.ticket}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A stand-in for a paid model, for the tickets.")
    parser.add_argument("--data", type=Path, required=True, help="folder of train.csv, test.csv")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="delay of each answer")
    args = parser.parse_args()
    paths = [args.data / name for name in ("train.csv", "test.csv")]
    for path in paths:
        if not path.is_file():
            parser.error(f"{path}: no such file. Run python -m examples.tickets.generate first.")
    tickets = [ticket for path in paths for ticket in read_tickets(path)]
    serve_forever(StandInTeacher(make_answer(tickets), args.latency_ms / 1000), port=args.port)


if __name__ == "__main__":
    main()
