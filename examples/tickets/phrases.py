"""The wording that generated tickets are put together from.

Each kind of phrase and each list of synonyms is in two parts: ``seen`` is used in the
training split; ``held_out`` appears in the test split only. There, problems, requests and
urgency are told in held-out phrases alone; for synonyms and small talk the held-out ones
stand beside the seen. The words in the slots carry the meaning and the phrases
around them vary, so that a person (and a student that has learned more than the training
text) can tell what a held-out phrase says. Slots in braces are filled from ``words`` or by
the generator.
"""

from examples.tickets.words import Wording

PROBLEMS = {
    "billing": Wording(
        (
            "My {card} {billed} for the {product}.",
            "For one {product} my {card} {billed}.",
            "The {invoice} for the {product} {mistake}.",
            "I paid for the {product} {time}, but the {invoice} {mistake}.",
            "I never got the {invoice} for my {product}.",
            "The {invoice} {mistake} and my {card} {billed} for the {product}.",
            "There are two payments for the {product} on my {card}.",
        ),
        (
            "Why is it that my {card} {billed} for a {product}?",
            "It seems that the {invoice} of my {product} {mistake}.",
            "We noticed that our {card} {billed} when we bought the {product}.",
        ),
    ),
    "delivery": Wording(
        (
            "My {product} {late}.",
            "The {parcel} with my {product} {late}.",
            "I am waiting for the {product}, the {parcel} {late}.",
            "Tracking says that the {product} {late}.",
            "The {courier} says that the {parcel} with the {product} {late}.",
            "The {courier} left the {product} at the wrong address.",
            "The {product} was shipped {time} and the {parcel} {late}.",
        ),
        (
            "It seems that the {parcel} with our {product} {late}.",
            "We asked the {courier} about the {product}, but the {parcel} {late}.",
            "Why is it that the {product} {late}? I see no {parcel}.",
        ),
    ),
    "returns": Wording(
        (
            "The {product} {unsuited} and I want to {sendback}.",
            "The {product} {unsuited}, can I {sendback}?",
            "I changed my mind about the {product} and want to {sendback}.",
            "I want to {sendback}: the {product} {unsuited}.",
            "I bought the {product} {time}, but it {unsuited}.",
            "I no longer need the {product} and would like to {sendback}.",
            "My {product} {unsuited}.",
        ),
        (
            "Since the {product} {unsuited}, I would rather {sendback}.",
            "It seems that the {product} {unsuited}, may I {sendback}?",
            "We wish to {sendback}, because our {product} {unsuited}.",
        ),
    ),
    "technical": Wording(
        (
            "My {product} {symptom}.",
            "The {product} {symptom} and {symptom}.",
            "Since the last update the {product} {symptom}.",
            "After a few minutes the {product} {symptom}.",
            "I set it up {time}, but the {product} {symptom}.",
            "The button does nothing and the {product} {symptom}.",
            "The {product} {symptom} when I use it.",
        ),
        (
            "It seems that the {product} {symptom} after every update.",
            "Why is it that our {product} {symptom}?",
            "We find that the {product} first {symptom} and then {symptom}.",
        ),
    ),
    "account": Wording(
        (
            "Since I registered the {product} {locked}.",
            "I want to register my {product}, but {locked}.",
            "I tried to add the {product} to my profile, but {locked}.",
            "My account has the wrong {detail} for the {product}.",
            "I want to change the {detail} in my profile, where the {product} is registered.",
            "Please delete my account, I only made it for the {product}.",
            "The {product} is missing in my profile and {locked}.",
        ),
        (
            "It seems that {locked} since I added the {product}.",
            "We failed to register our {product}, because {locked}.",
            "Why is it that {locked}? I only wanted to register the {product}.",
        ),
    ),
}

REQUESTS = {
    "billing": Wording(
        (
            "Please correct the {invoice}.",
            "Please pay the money back to my {card}.",
            "Can you check the payment?",
            "Please send me a new {invoice}.",
        ),
        ("Could you look at the payment and the {invoice}?", "Kindly correct the price I paid."),
    ),
    "delivery": Wording(
        (
            "Please ask the {courier} where it is.",
            "Can you track the {parcel}?",
            "When will the {parcel} arrive?",
            "Please ship it again.",
        ),
        (
            "Could you find out when the {courier} will arrive?",
            "Kindly track where the {parcel} is.",
        ),
    ),
    "returns": Wording(
        (
            "Please send me a return label.",
            "Can I have another colour?",
            "How does a return work?",
            "Please tell me how to {sendback}.",
        ),
        ("Could I get a return label or another colour?", "Kindly explain how the return works."),
    ),
    "technical": Wording(
        (
            "How can I repair it?",
            "Is there an update that fixes it?",
            "What can I do to make it work?",
            "Please tell me how to fix it.",
        ),
        ("Could you explain how to fix or repair it?", "Kindly send an update that makes it work."),
    ),
    "account": Wording(
        (
            "Please unlock my account.",
            "Please update my profile.",
            "Can you change the {detail} in my account?",
            "Please send me a new password.",
        ),
        ("Could you unlock or update my profile?", "Kindly check my account and my password."),
    ),
}

URGENCY = {
    "high": Wording(
        (
            "Please {reply} {soon}.",
            "Please {reply} {soon}, {urgent}.",
            "I need this solved {soon}.",
            "Sorry, but {urgent}.",
            "I know you are busy, but {urgent}.",
        ),
        ("You have to {reply} {soon}, because {urgent}.", "As {urgent}, we hope for news {soon}."),
    ),
    "low": Wording(
        (
            "Please {reply} {someday}.",
            "You can {reply} {someday}, {relaxed}.",
            "It is enough to {reply} {someday}.",
            "By the way, {relaxed}.",
            "I know you are busy, and {relaxed}.",
        ),
        (
            "You are free to {reply} {someday}, because {relaxed}.",
            "As {relaxed}, news {someday} will do.",
        ),
    ),
    # A ticket that says nothing about time is of normal urgency too: the empty phrases.
    "normal": Wording(
        ("", "", "Please {reply} {in_days}.", "I hope you can {reply} {in_days}."),
        ("", "It would be good if you could {reply} {in_days}."),
    ),
}

ORDERS = Wording(
    (
        "My order is #{order}.",
        "Order number #{order}.",
        "I placed order #{order} {time}.",
        "I ordered it {time} (order #{order}).",
        "It is about order #{order}.",
    ),
    (
        "You find it under order #{order}.",
        "This concerns my order #{order}.",
        "The number of the order is #{order}.",
    ),
)

# The sign before the number keeps a tokenizer from joining the number to the space.
SUBJECTS = Wording(("Order #{order}:", "Re: order #{order} -"), ("About order #{order}:",))

OPENERS = Wording(
    (
        "Hello,",
        "Hi,",
        "Hi there,",
        "Good morning,",
        "Dear support team,",
        "Hello support,",
        "Hey,",
    ),
    ("Good evening,", "Dear team,", "Greetings,"),
)

MOODS = Wording(
    (
        "I have bought from you for years.",
        "I am a bit disappointed.",
        "Usually I am happy with your shop.",
        "I already tried the help page.",
        "A friend told me to write to you.",
        "Nobody answered the phone when I called {time}.",
        "I am not sure who to ask.",
        "My family uses it a lot.",
    ),
    (
        "I looked at the help page without luck.",
        "So far I was a happy customer.",
        "Your phone line was busy {time}.",
        "Honestly I am a little annoyed.",
    ),
)

CLOSINGS = Wording(
    (
        "Thanks,",
        "Thank you,",
        "Best regards,",
        "Kind regards,",
        "Many thanks,",
        "Cheers,",
    ),
    ("Yours sincerely,", "Warm regards,", "With thanks,"),
)

NAMES = Wording(
    (
        "Anna",
        "Ben",
        "Carla",
        "David",
        "Elif",
        "Farid",
        "Grace",
        "Hugo",
        "Ines",
        "Jonas",
        "Kofi",
    ),
    ("Lena", "Marek", "Nadia", "Oscar", "Priya"),
)
