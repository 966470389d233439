"""The support-desk program: two predictors, one after the other, and its metric."""

from typing import Literal

import dspy

Queue = Literal["account", "billing", "delivery", "returns", "technical"]
Urgency = Literal["low", "normal", "high"]

FIELDS = ("queue", "urgency", "product", "order_id")


class Triage(dspy.Signature):
    """Decide which team a support ticket goes to and how soon it must be answered."""

    ticket: str = dspy.InputField()
    queue: Queue = dspy.OutputField()
    urgency: Urgency = dspy.OutputField()


class Extract(dspy.Signature):
    """Take out the product and the order that a support ticket is about."""

    ticket: str = dspy.InputField()
    queue: Queue = dspy.InputField(desc="the team that the ticket goes to")
    product: str = dspy.OutputField(desc="the product's name as the catalogue has it")
    order_id: str = dspy.OutputField(desc="such as B2-V8, or none when no order is named")


class SupportDesk(dspy.Module):
    """ticket -> queue, urgency, product, order_id."""

    def __init__(self) -> None:
        super().__init__()
        self.triage = dspy.Predict(Triage)
        self.extract = dspy.Predict(Extract)

    def forward(self, ticket: str) -> dspy.Prediction:
        sorted_ticket = self.triage(ticket=ticket)
        found = self.extract(ticket=ticket, queue=sorted_ticket.queue)
        return dspy.Prediction(
            queue=sorted_ticket.queue,
            urgency=sorted_ticket.urgency,
            product=found.product,
            order_id=found.order_id,
        )


def build() -> dspy.Module:
    """The program, as the configuration names it."""
    return SupportDesk()


def metric(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Whether all four answers are right."""
    return all(getattr(prediction, field) == getattr(example, field) for field in FIELDS)
