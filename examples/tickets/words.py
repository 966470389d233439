"""The words of generated tickets: the product catalogue and lists of synonyms.

``phrases`` has the sentences that they are put into, and says what is held out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Ways to say one thing."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


PRODUCTS = (
    "Arden kettle",
    "Brio headset",
    "Falcon drone",
    "Lumo lamp",
    "Mira camera",
    "Nimbus fan",
    "Orbit router",
    "Pico speaker",
    "Quill keyboard",
    "Solis charger",
    "Terra vacuum",
    "Vesta heater",
)

WORDS = {
    # billing
    "card": Wording(("card", "bank account", "credit card"), ("bank statement",)),
    "invoice": Wording(("invoice", "receipt"), ("bill",)),
    "billed": Wording(
        ("was charged twice", "was billed twice", "was charged too much", "was billed two times"),
        ("was debited twice", "was overcharged"),
    ),
    "mistake": Wording(
        ("shows the wrong price", "has the wrong tax", "is missing my discount", "is too high"),
        ("shows the wrong total", "is missing my voucher"),
    ),
    # delivery
    "parcel": Wording(("parcel", "package", "delivery"), ("box",)),
    "courier": Wording(("courier", "driver", "postman"), ("carrier",)),
    "late": Wording(
        ("has not arrived", "is late", "never came", "is lost", "is still on its way"),
        ("has not come", "is overdue"),
    ),
    # returns
    "sendback": Wording(("return it", "send it back", "exchange it"), ("hand it back",)),
    "unsuited": Wording(
        ("is too big", "is too small", "has the wrong colour", "does not suit me", "is not for me"),
        ("is too heavy", "has the wrong size"),
    ),
    # technical
    "symptom": Wording(
        (
            "does not turn on",
            "does not connect",
            "shows an error",
            "makes a strange noise",
            "keeps blinking",
            "switches itself off",
            "stops working",
            "is broken",
        ),
        ("shuts itself off", "is defective", "makes a loud noise"),
    ),
    # account
    "locked": Wording(
        (
            "I cannot log in",
            "I cannot sign in",
            "my account is locked",
            "my password is refused",
            "I forgot my password",
            "my profile is empty",
        ),
        ("I cannot access my account", "my passcode is refused"),
    ),
    "detail": Wording(("email address", "phone number", "user name", "password"), ("surname",)),
    # urgency
    "reply": Wording(("answer", "reply", "help me", "write back", "call me"), ("respond",)),
    "soon": Wording(
        ("today", "immediately", "right away", "as soon as possible", "within the hour"),
        ("at once", "as fast as possible"),
    ),
    "urgent": Wording(
        ("it is very urgent", "this is an emergency", "it cannot wait", "every hour counts"),
        ("every minute counts", "it is really urgent"),
    ),
    "in_days": Wording(("this week", "in the next days", "in some days"), ("in a few days",)),
    "someday": Wording(
        ("when you have time", "some time next month", "whenever it suits you", "next month"),
        ("when you find time", "some day next month"),
    ),
    "relaxed": Wording(
        ("there is no rush", "it is not urgent", "it can wait", "I am in no hurry"),
        ("it can surely wait", "there is no hurry"),
    ),
    # anything
    "time": Wording(("on Monday", "last week", "yesterday", "in May"), ("on Friday", "in June")),
    "colour": Wording(("black", "white", "red"), ("green",)),
}
