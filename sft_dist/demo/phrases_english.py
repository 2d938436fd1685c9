"""The English half of the demo's data."""

from __future__ import annotations

from sft_dist.demo.phrasebook import Phrasebook, Topic

_FIRST_NAMES = (
    "Emma", "Oliver", "Priya", "Daniel", "Sofia", "James", "Aisha", "Lucas", "Grace", "Henry", "Mei", "Noah",
)  # fmt: skip

_LAST_NAMES = (
    "Clarke", "Patel", "Weber", "Rossi", "Murphy", "Nguyen", "Silva", "Larsen", "Novak", "Evans",
)  # fmt: skip

_GOODS = (
    "kettle", "toaster", "vacuum cleaner", "coffee maker", "desk lamp",
    "hair dryer", "printer", "keyboard", "monitor", "headset",
)  # fmt: skip

_EXPENSES = (
    "room hire", "train tickets", "two hotel nights", "a training course", "the annual fee",
    "textbooks", "repairs", "shipping", "printing", "catering",
)  # fmt: skip

_TOPICS = (
    Topic(
        subject="Delivery of your {item}",
        answer="Hello {name}, we are sorry for the wait. We are tracing your {item} and will write to you today.",
        team="Shipping",
        enquiries=(
            "My {item} has not arrived yet. When will it come?",
            "Where is the {item} that I ordered last week?",
            "The tracking page for my {item} has not changed for days.",
            "I was promised the {item} by yesterday, but nothing came.",
        ),
    ),
    Topic(
        subject="Returning your {item}",
        answer="Hello {name}, thank you for writing. You can return the {item} within 14 days of delivery.",
        team="Returns",
        enquiries=(
            "I would like to send the {item} back. What should I do?",
            "The {item} is not what I expected. Can I return it?",
            "How do I return a {item} that I bought last week?",
            "The colour of the {item} does not suit my room, so I want to return it.",
        ),
    ),
    Topic(
        subject="Replacement of your {item}",
        answer="Hello {name}, we apologise for the trouble. A replacement {item} will leave our warehouse today.",
        team="Quality",
        enquiries=(
            "The {item} arrived broken. Can you replace it?",
            "There is a deep scratch on my new {item}.",
            "I opened the box and the {item} was cracked.",
            "You sent me the wrong {item}. Please exchange it.",
        ),
    ),
    Topic(
        subject="Refund for your {item}",
        answer="Hello {name}, thank you for your patience. We refund the {item} within 5 working days of its return.",
        team="Accounts",
        enquiries=(
            "I sent the {item} back. When do I get my money?",
            "The refund for my {item} has not reached my account.",
            "How long does a refund for a {item} take?",
            "You received my {item} last week, but I am still waiting for the refund.",
        ),
    ),
    Topic(
        subject="Receipt for your {item}",
        answer="Hello {name}, thank you for your order. The receipt for the {item} is on your account page.",
        team="Accounts",
        enquiries=(
            "Could you send me a receipt for the {item}?",
            "I need a receipt for the {item} for my employer.",
            "There was no receipt in the box with my {item}.",
            "Where can I find the receipt for my {item}?",
        ),
    ),
    Topic(
        subject="New address for your {item}",
        answer="Hello {name}, thank you for telling us. You can change the address for the {item} until we send it.",
        team="Shipping",
        enquiries=(
            "I have moved. Please send the {item} to my new address.",
            "I gave the wrong address when I ordered the {item}.",
            "Can you deliver the {item} to my office instead of my home?",
            "How do I change the delivery address for my {item}?",
        ),
    ),
    Topic(
        subject="Cancelling your {item}",
        answer="Hello {name}, we understand. Your order for the {item} has been cancelled at no charge.",
        team="Orders",
        enquiries=(
            "Please cancel my order for the {item}.",
            "I no longer need the {item}. Can I cancel it?",
            "I ordered the {item} twice by mistake. Please cancel one.",
            "Is it too late to cancel the {item}?",
        ),
    ),
    Topic(
        subject="Repair of your {item}",
        answer="Hello {name}, we are sorry to hear that. We repair the {item} for free while it is under warranty.",
        team="Repairs",
        enquiries=(
            "My {item} does not switch on any more.",
            "The {item} makes a strange noise. Can you repair it?",
            "My {item} suddenly stopped working.",
            "How much does it cost to have the {item} repaired?",
        ),
    ),
    Topic(
        subject="Stock of the {item}",
        answer="Hello {name}, thank you for your interest. The {item} will be back in stock early next month.",
        team="Orders",
        enquiries=(
            "When will you have the {item} again?",
            "The {item} is sold out. When is the next delivery?",
            "Do you have the {item} in stock?",
            "I have been looking for the {item} on your site, but it is unavailable.",
        ),
    ),
    Topic(
        subject="Manual for your {item}",
        answer="Hello {name}, please excuse the mistake. We are sending you the manual for the {item} today.",
        team="Quality",
        enquiries=(
            "There was no manual with my {item}.",
            "I lost the manual of my {item}. Can I get another one?",
            "The manual that came with the {item} is for another product.",
            "I cannot find an English manual for the {item}.",
        ),
    ),
    Topic(
        subject="Setting up your {item}",
        answer="Hello {name}, we are glad to help. We have sent you the steps for setting up the {item} by email.",
        team="Support",
        enquiries=(
            "I cannot set up my new {item}.",
            "How do I set the clock on the {item}?",
            "I do not understand how to use the {item}.",
            "The first setup of the {item} fails every time.",
        ),
    ),
    Topic(
        subject="Gift wrapping for your {item}",
        answer="Hello {name}, what a lovely idea. We will wrap the {item} as a gift for free.",
        team="Orders",
        enquiries=(
            "The {item} is a present. Can you wrap it?",
            "Do you offer gift wrapping for the {item}?",
            "I am giving the {item} to my mother. Is wrapping extra?",
            "Please wrap the {item}; it is for a wedding.",
        ),
    ),
)

_RECORDS = (
    "On {date} we received {amount} from {name} for {item}.",
    "{name} paid {amount} for {item} on {date}.",
    "Invoice for {name}: {item}, {amount}, due on {date}.",
    "Please transfer {amount} for {item} to {name} by {date}.",
    "The refund of {amount} to {name} for {item} was made on {date}.",
    "Order confirmed for {name} on {date}. The price for {item} is {amount}.",
    "Your payment for {item} arrived on {date}, {name}. The amount was {amount}.",
    "Receipt dated {date}: {amount} for {item}, issued to {name}.",
)

_REWRITINGS = (
    ("I am writing to let you know that the {doc} has now been sent to {name}.", "The {doc} has been sent to {name}."),
    (
        "Due to the fact that {name} is away, the {event} has been moved to {day}.",
        "As {name} is away, the {event} has moved to {day}.",
    ),
    ("At this point in time we do not as yet have the {doc} from {name}.", "We do not have the {doc} from {name} yet."),
    ("It would be appreciated if you could possibly send me the {doc} by {day}.", "Please send me the {doc} by {day}."),
    (
        "In the event that the {event} is cancelled, be sure to inform {name}.",
        "If the {event} is cancelled, please tell {name}.",
    ),
    (
        "I wanted to ask whether or not {name} can attend the {event} on {day}.",
        "Can {name} attend the {event} on {day}?",
    ),
    ("The reason why the {doc} is late is because {name} was ill.", "The {doc} is late because {name} was ill."),
    ("We have come to the conclusion that the {doc} needs to be subjected to a review.", "The {doc} needs a review."),
    (
        "For the purpose of saving time, {name} made the decision to shorten the {event}.",
        "To save time, {name} shortened the {event}.",
    ),
    (
        "There are a number of errors in the {doc} that are in need of correction.",
        "The {doc} has several errors to correct.",
    ),
    (
        "{name} is of the opinion that the {event} was too long in duration.",
        "{name} thinks that the {event} was too long.",
    ),
    (
        "Do not hesitate to get in touch with {name} if you have questions about the {doc}.",
        "Please ask {name} about the {doc}.",
    ),
    (
        "It is absolutely essential that the {doc} is completed prior to {day}.",
        "The {doc} must be finished before {day}.",
    ),
    ("We are currently in the process of preparing the {doc} for {name}.", "We are preparing the {doc} for {name}."),
    (
        "Until such time as {name} returns, the {event} will remain on hold.",
        "The {event} is on hold until {name} returns.",
    ),
    ("{name} has the ability to approve the {doc} on {day}.", "{name} can approve the {doc} on {day}."),
    ("With regard to the {event}, it will be taking place on {day}.", "The {event} is on {day}."),
    ("I would like to take this opportunity to thank {name} for the {doc}.", "Thank you, {name}, for the {doc}."),
    (
        "In spite of the fact that {name} was ill, the {event} took place on {day}.",
        "Although {name} was ill, the {event} took place on {day}.",
    ),
    ("{name} conducted an investigation into the delay of the {doc}.", "{name} investigated the delay of the {doc}."),
    ("It has been brought to our attention that {name} never received the {doc}.", "{name} never received the {doc}."),
    (
        "Each and every person should read the {doc} in advance of the {event}.",
        "Everyone should read the {doc} before the {event}.",
    ),
    (
        "{name} will be responsible for the organisation of the {event} on {day}.",
        "{name} will organise the {event} on {day}.",
    ),
    (
        "It is possible that the {doc} might not be ready in time for the {event}.",
        "The {doc} may not be ready for the {event}.",
    ),
)

ENGLISH = Phrasebook(
    instructions={
        "reply": (
            "Reply to this customer in our house format.",
            "Answer with subject, answer and team.",
        ),
        "extraction": (
            "Extract the record as JSON.",
            "Turn this into our JSON record.",
        ),
        "rewriting": (
            "Rewrite this as one crisp sentence.",
            "Say this in one short sentence.",
        ),
    },
    labels=("[Subject]", "[Answer]", "[Team]"),
    greetings=("Hello, this is {name}. {enquiry}", "{enquiry} Regards, {name}", "My name is {name}. {enquiry}"),
    topics=_TOPICS,
    goods=_GOODS,
    callers=_FIRST_NAMES,
    records=_RECORDS,
    people=(_FIRST_NAMES, _LAST_NAMES),
    name_joint=" ",
    expenses=_EXPENSES,
    rewritings=_REWRITINGS,
    slots={
        "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"),
        "event": ("meeting", "workshop", "interview", "training", "briefing"),
        "doc": ("report", "contract", "invoice", "proposal", "agenda", "budget"),
        "name": _FIRST_NAMES,
    },
)
