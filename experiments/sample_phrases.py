"""The words of the sample traffic: how customers ask for each tool, chat and complain, and what the teacher replies.

Data only, read by `sample_grammar`. `(a|b)` is a choice, `[a]` an option, `<can>` a macro and `{reason}` a slot; a line
that ends in `?` is a question.

    <can> cancel <order>[ because {reason}]?     →  "Could you cancel order A1043 because I found it cheaper?"
"""

from __future__ import annotations

from typing import Any

MACROS = {
    "can": "(can you|could you|can you please|could you please|would you|are you able to)",
    "please": "(please|kindly|I need you to|I'd like you to|go ahead and)",
    "want": "(I want to|I'd like to|I need to|I would like to|I have to|I was hoping to)",
    "order": "(order {order_id}|my order {order_id}|order number {order_id}|order #{order_id}|{order_id})",
    "it": "(my order|the order|my last order|that order|it)",
    "paper": "(invoice|receipt|bill)",
    "person": "(someone|an agent|somebody|a person)",
}

SHORTHAND = {"please": "pls", "you": "u", "your": "ur", "thanks": "thx", "because": "cuz", "address": "adress"}
"""A known word → how it is also written."""

SOON = ["today", "tomorrow", "this afternoon", "tonight", "next week", "tomorrow morning", "next Monday"]

_POOLS = {
    "look": "ceramic wooden linen blue black copper folding striped woolen glass cotton leather bamboo velvet steel "
    "marble yellow wireless enamel canvas silver rubber oak travel",
    "thing": "kettle lamp scarf mug backpack chair rug blanket teapot speaker mirror jacket pillow toaster vase "
    "umbrella bowl clock bench sandals curtain tray stool raincoat",
    "street": "Oak Elm Mill Harbor Cedar Park Station Birch Willow Castle Meadow River Chapel Garden Hill Lake King "
    "Queen Maple Orchard Bridge Church Victoria Bishop Laurel Sunset Windmill Abbey Canal Forge",
    "way": "Street Road Lane Avenue Drive Court Way Square",
    "city": "Leeds Bristol Boston Dublin Austin Denver Oslo Cork Exeter Durham Portland Madison Salem Truro Hull "
    "Geneva Lisbon Vienna Krakow Antwerp Utrecht Malmo",
    "first": "Lena Omar Priya Jonas Mei Carlos Aisha Tom Ingrid Kofi Sara Diego Hana Peter Nadia Liam Yuki Elif Marta "
    "Ravi Chloe Ivan Zoe Samuel",
    "last": "Ortiz Novak Patel Berg Chen Silva Khan Reed Larsen Mensah Costa Weber Sato Brown Haddad Kelly Tanaka "
    "Demir Rossi Iyer Martin Petrov Young Okafor",
    "domain": "example.com mail.example post.example inbox.example example.org",
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday",
    "month": "January February March April May June July August September October November December",
}
POOLS = {name: words.split() for name, words in _POOLS.items()}

VALUES: dict[str, dict[Any, str]] = {
    "reason": {
        "found_cheaper": "I found it cheaper|I saw it cheaper elsewhere|another shop has it for less",
        "ordered_by_mistake": "I ordered it by mistake|it was an accident|I clicked the wrong button",
        "too_slow": "it takes too long|delivery is too slow|it would arrive too late",
        "changed_mind": "I changed my mind|I've changed my mind|I don't want it anymore",
    },
    "problem": {
        "damaged": "it arrived broken|it came damaged|it is cracked|it arrived with a dent",
        "wrong_item": "you sent the wrong thing|it's not what I ordered|I got the wrong item",
        "wrong_size": "it's too small|it is too big|it doesn't fit|the size is wrong",
        "not_needed": "I don't need it|I have no use for it|we no longer need it",
    },
    "sms_updates": {
        True: "text me updates|send me text updates|keep me posted by text",
        False: "don't text me|no text messages please|skip the texts",
    },
    "format": {"pdf": "as a PDF|in PDF format|as PDF", "paper": "on paper|by post|as a paper copy"},
    "store_credit": {
        True: "as store credit|as a voucher|as shop credit",
        False: "to my card|to my bank card|to my bank account",
    },
    "urgency": {
        "low": "no rush|whenever it suits you|it's not urgent",
        "normal": "normal priority|nothing dramatic",
        "high": "asap|it's urgent|this is urgent|it can't wait",
    },
    "method": {"email": "by email|by mail", "sms": "by text|by SMS"},
    # of support tickets: what went wrong and what the customer asks for, as the summary words it
    "issue": {
        "arrived broken": "arrived in pieces|was smashed when I opened the box|came broken",
        "never arrived": "never showed up|still isn't here after two weeks|was never delivered",
        "stopped working": "stopped working after three days|died within a week|no longer switches on",
        "was charged twice": "was charged twice|shows up twice on my card statement",
        "was the wrong color": "came in the wrong color|has a different color than on the website",
        "is missing parts": "came without its screws|is missing a part|had parts missing",
    },
    "wish": {
        "a replacement": "send me a new one|I would like a replacement|please replace it",
        "a refund": "I want my money back|please refund me|I expect a full refund",
        "an answer by phone": "please call me about this|I would rather talk on the phone",
        "a repair": "can it be repaired?|I would be happy with a repair",
    },
}
"""Slots with fixed wordings: argument value → the ways to say it."""

PHRASES: dict[str, str] = {
    "lookup_order": """
<can> (look up|check|pull up|bring up) <order>?
<please> (look up|check|pull up) <order>
what's the (current |)status of <order>?
what (is|was) in <order>?
<want> see the details (of|for) <order>
(status|details) of <order>[ please]
any (news|word) on <order>?
has <order> been (processed|packed|confirmed)[ yet]?
show me <order>
did my payment go through for <order>?
what was the total (of|for) <order>?
I can't remember what I bought in <order>
tell me [more ]about <order>
is <order> confirmed?
just checking (in |)on <order>
which (items|products) are in <order>?
what's the status of <it>?
<can> check <it>?
any news on <it>?
did my payment go through for <it>?
""",
    "track_package": """
where is <order>[ right now]?
where's <order> (now|at the moment)?
<can> track <order>[ and {sms_updates}]?
when will <order> (arrive|get here|be delivered)?
track <order>[, {sms_updates}]
I'm still waiting for <order>[, {sms_updates}]
<order> hasn't (arrived|come) yet
has <order> left the (warehouse|depot)[ yet]?
how far away is <order>?
what's the ETA (for|on) <order>?
the courier was supposed to bring <order> (yesterday|last week)
which day will <order> be here?
<want> follow the (parcel|package|delivery) for <order>
is <order> out for delivery?
(locate|find) the (parcel|package) for <order>[, {sms_updates}]
my (parcel|package) from <order> (is late|got lost)
where is <it>?
when will <it> (arrive|get here)?
I'm still waiting for <it>
<can> track <it>?
""",
    "cancel_order": """
<can> cancel <order>[ because {reason}]?
<want> cancel <order>[, {reason}]
<please> cancel <order>[, {reason}]
cancel <order>[, {reason}]
(call off|scrap|drop|void) <order>[, {reason}]
<please> stop <order> before it ships
I no longer (need|want) <order>
don't (send|ship) <order>[, {reason}]
{reason}, so (cancel|please cancel) <order>
is it (still possible|too late) to cancel <order>?
I have decided not to go ahead with <order>
<order> needs to be cancelled[, {reason}]
how (do|can) I cancel <order>?
I shouldn't have placed <order>, (cancel|stop) it
forget about <order>[, {reason}]
<want> cancel <it>[ because {reason}]
<can> cancel <it>?
{reason}, please cancel <it>
how (do|can) I cancel <it>?
""",
    "start_return": """
<want> return <order> because {problem}
<want> return {items} from <order>, {problem}
<can> start a return for <order>, {problem}?
{problem}, so <want> send <order> back
{problem}, so I'm returning {items} from <order>
(open|set up|create) a return for <order>, {problem}
how do I return <order>, {problem}?
return {items} from <order> because {problem}
<order> has to go back because {problem}
I'm not happy with <order>, {problem}, so I want to return it
about {items} in <order>: {problem}, I'm sending that back
<please> arrange a return, {problem}, <order>
send me a return label for <order>, {problem}
{items} from <order> should go back, {problem}
I'm returning <order>, {problem}
who picks up returns? it's <order>, {problem}
<want> return <order>
how do I return <order>?
<want> return <it> because {problem}
{problem}, can I return <it>?
how do I return <it>?
""",
    "change_delivery_address": """
<can> (change|update) the [delivery |shipping ]address (of|for|on) <order> to {address}?
<please> send <order> to {address}[ instead]
(deliver|ship|redirect|forward) <order> to {address}[ instead]
I've moved, <order> should go to {address}
the address on <order> is wrong, it should be {address}
<order> needs to go to {address}
my new address is {address}, please update <order>
<want> have <order> delivered to {address}
<please> reroute <order> to {address}
can <order> be (sent|delivered|shipped) to {address}?
use {address} for <order>
I gave the wrong address for <order>, the right one is {address}
new address for <order>: {address}
I'm staying at {address} now, bring <order> there
is it possible to get <order> at {address}?
<want> change the address (of|for) <order>
I've moved to {address}, please update <it>
<can> send <it> to {address}?
""",
    "get_invoice": """
<can> send me the <paper> for <order>[ {format}]?
I need the <paper> for <order>[ {format}]
where can I find the <paper> for <order>?
<paper> for <order>[ {format}]
my (accountant|boss) (needs|wants) the <paper> for <order>[ {format}]
I (never got|didn't receive) the <paper> for <order>
<please> email me the <paper> for <order>
I lost the <paper> for <order>
<order> came without the <paper>
(download|print) the <paper> for <order>
I have to claim <order> as an expense, send the <paper>[ {format}]
<want> have the <paper> for <order>[ {format}]
I need proof of purchase for <order>[ {format}]
is there a <paper> for <order>?
for my taxes: the <paper> for <order>[ {format}]
<can> send me the <paper> for <it>[ {format}]?
I need the <paper> for <it>[ {format}]
where can I find the <paper> for <it>?
""",
    "apply_refund": """
<can> refund {amount} (on|for) <order>[ {store_credit}]?
I was (charged|billed) {amount} too much (on|for) <order>
<want> get {amount} back for <order>[ {store_credit}]
I'm owed {amount} (on|for) <order>
give me {amount} back (on|for) <order>[ {store_credit}]
<please> refund me {amount} for <order>[ {store_credit}]
you overcharged me by {amount} on <order>
{amount} refund for <order>[ {store_credit}]
<order> was {amount} cheaper yesterday, refund the difference
the agent promised me {amount} back on <order>
I'm still missing my {amount} refund for <order>
pay {amount} from <order> back {store_credit}
I expect a refund of {amount} for <order>[ {store_credit}]
<can> pay me back {amount} for <order>[ {store_credit}]?
I should get {amount} back for <order>
I want a refund for <order>
I was (charged|billed) {amount} too much for <it>
<can> refund {amount} for <it>[ {store_credit}]?
""",
    "check_stock": """
do you [still ]have the {product} in stock?
is the {product} (available|in stock|sold out)?
have you got {quantity} of the {product}?
<want> buy {quantity} of the {product}, do you have (that many|enough)?
is there (any|a) {product} left?
when will the {product} be back[ in stock]?
<can> check (stock|availability) (of|for) the {product}?
how many of the {product} do you have?
I'm looking for the {product}, do you have it?
does your (shop|store|warehouse) have the {product}?
<want> order {quantity} of the {product}, is that possible?
can I still (get|buy) the {product}?
the site says the {product} is sold out, is that (right|true)?
are {quantity} of the {product} available?
I need {quantity} of the {product}, are they in stock?
{product}, in stock?
do you still have that lamp from the window in stock?
is the one in your newsletter available?
<want> buy {quantity} of them, do you have enough?
""",
    "schedule_callback": """
<can> call me [back ]on {phone} {day}[, {urgency}]?
(call|ring|phone) me {day} on {phone}[, {urgency}]
<want> (speak|talk) to <person> {day}, my number is {phone}
have <person> ring {phone} {day}[, {urgency}]
my number is {phone}, call me {day}[, {urgency}]
I'm free {day}, reach me on {phone}
<please> schedule a call {day} to {phone}
<please> arrange a callback {day} at {phone}[, {urgency}]
give me a ring {day}, {phone}[, {urgency}]
is anyone able to phone {phone} {day}?
{urgency}, call {phone} {day}
I prefer the phone: {phone}, {day} would be good
book me a [phone ]call {day} on {phone}
<person> should (call|ring) {phone} {day}
can I get a call {day}, {phone}?
<can> call me back {day}[, {urgency}]?
<want> (speak|talk) to <person> {day}
<can> call me [back ]on {phone}?
""",
    "reset_password": """
<can> reset the password (for|of) {email}[ {method}]?
I (forgot|lost|can't remember) my password for {email}
I'm locked out of {email}
<please> reset {email}[ {method}]
<please> send a (reset|password) link to {email}
I can't (log|sign) in (as|with) {email}
my password for {email} (doesn't work|stopped working|isn't accepted)
{email} can't log in (anymore|any more|again)
<want> (set|choose|get) a new password for {email}
new password for {email}[ {method}]
my account is {email} and I've lost the password
the login for {email} is (blocked|broken|locked)
how do I reset the password (for|of) {email}?
help me get back into {email}
someone changed the password on {email}, reset it
password reset for {email}[ {method}]
I forgot my password
I can't (log|sign) in
I'm locked out of my account
<want> reset my password
""",
}
"""Tool → ways to ask for it, one a line; the last few lack a required value, so that the teacher has to ask."""

CHAINS: list[tuple[str, str, str]] = [
    ("lookup_order", "cancel_order", "check <order> and if it has not shipped yet, cancel it[ because {reason}]"),
    ("lookup_order", "cancel_order", "<can> look at <order> and cancel it if it is still processing?"),
    ("lookup_order", "cancel_order", "if <order> is still processing, cancel it[, {reason}]"),
    ("lookup_order", "change_delivery_address", "if <order> has not shipped, send it to {address} instead"),
    ("lookup_order", "change_delivery_address", "<can> check <order> and ship it to {address} if it has not left yet?"),
    (
        "track_package",
        "apply_refund",
        "find out where <order> is and if it is late, refund me {amount}[ {store_credit}]",
    ),
    ("track_package", "apply_refund", "<can> track <order> and if it is delayed give me {amount} back?"),
    ("check_stock", "schedule_callback", "see if the {product} is in stock and if it is, call me on {phone} {day}"),
    ("check_stock", "schedule_callback", "if you have the {product}, ring {phone} {day}[, {urgency}]"),
]
"""(first tool, second tool, the request for both): the second is called if the result of the first allows it."""

CHAT: dict[str, tuple[str, str]] = {
    "greeting": (
        "Hello! How can I help you today?",
        """
(hi|hello|hey|good morning|good evening|good afternoon)[ there| everyone| team]
(hello|hi), (is anyone there|anybody here|are you there)?
(hi|hey), I have a (quick |small |)question
how are you[ today| doing]?
(hi|hello), I need (some |a bit of |)help
(hi|hello), (first time|new) here
""",
    ),
    "thanks": (
        "You're welcome! Is there anything else I can do for you?",
        """
(thanks|thank you|cheers)[ so much| a lot| very much][, that's all| for the help| for your time]
(great|perfect|wonderful|awesome|super), (thanks|thank you|that's all)
(that's all|that's everything)[ for now| for today][, thank you]
(ok|okay|alright), that (helps|works|answers it)[, thanks| a lot]
you've been (very |really |)(helpful|kind)
(bye|goodbye|see you)[, have a nice (day|evening|weekend)]
""",
    ),
    "scope": (
        "Sorry, I can only help with orders, deliveries, returns and accounts.",
        """
what's the weather [like ](today|tomorrow|in Paris|this weekend)?
(write|tell) me a (poem|joke|story)[ about (cats|the sea|my boss|winter)]
who (won|will win) the (election|cup final|match|race)[ last night]?
<can> (book|find) me a (flight|hotel|table|taxi)[ in (Rome|Lisbon|Berlin)]?
what is the (capital|population) of (Peru|Norway|Kenya|Japan)?
help me with my (homework|tax return|essay|CV)
translate this (letter|menu|email) (to|into) (Spanish|German|French)[ for me]
what should I (cook|wear|watch|read) (tonight|tomorrow|on Sunday)?
which (stocks|shares|lottery numbers) should I buy?
<can> recommend a good (film|restaurant|dentist|podcast)[ near here]?
""",
    ),
    "policy": (
        "You can find that on our help page: acme.example/help.",
        """
what are your (opening hours|hours|delivery times|shipping costs)?
how long (do|does) (a refund|a return|delivery|shipping) [usually ]take?
(do you ship|do you deliver) to (Canada|Norway|islands|Mexico|Japan|Germany)?
what is your (return|refund|privacy|cookie) policy?
(do you have|is there) a (shop|store|showroom|branch) (near me|in London|downtown)?
how much (is|does) (express|standard|overnight) (shipping|delivery)[ cost]?
(do you offer|is there) a (student|loyalty|staff|senior) discount?
which (payment methods|credit cards|currencies) do you (accept|take)?
(do you sell|can I buy) gift cards?
are you (hiring|open on holidays|open on Sundays)?
""",
    ),
    "opinion": (
        "Thank you for your feedback! I will pass it on to our team.",
        """
I (love|like|really enjoy|hate) (your|the) (new |)(website|app|shop|packaging|newsletter)
your (prices|photos|emails|adverts) are (great|terrible|too high|so good|annoying)
(great|terrible|lovely|awful|decent) (service|shop|quality)[, five stars|, two stars| as always]
my (kids|friends|parents|neighbors) (love|adore|recommend) your (stuff|products|shop)
(the|your) new (logo|design|catalog|app) is (ugly|beautiful|confusing|brilliant)
(just|I only) wanted to say (you are doing well|the quality is excellent|the shop looks lovely)
you should (sell|offer|stock) more (plants|books|toys|colors)
""",
    ),
    "identity": (
        "I'm Acme's virtual assistant, here to help with your orders.",
        """
are you (a robot|a bot|human|a real person|an AI)?
(am I|are we) (talking|chatting) (to|with) a (human|machine|person|bot)?
what can you do[ for me]?
who (are you|am I talking to)?
what('s| is) your name?
(do you|can you) (sleep|have feelings|get tired|think)?
""",
    ),
}
"""Topic without a tool → (the teacher's reply, ways to bring it up)."""

OPENERS = [
    "hi, ", "hello, ", "hey, ", "hi there. ", "good morning. ", "good evening, ", "hello team, ", "dear support, ",
    "excuse me, ", "quick one: ", "sorry to bother you, ", "hope you are well. ", "me again. ", "so, ", "ok, ",
    "I'm on my phone, so I'll be brief. ", "the website keeps crashing on me. ", "I already looked at the FAQ. ",
    "not sure this is the right place. ", "my internet is slow. ", "I'm a long-time customer. ",
    "my daughter told me to write here. ", "I waited in the chat queue for ages. ", "this is my first time asking. ",
]  # fmt: skip
CLOSERS = [
    " Thanks!", " Thank you.", " Cheers", " Thanks in advance.", " Many thanks!", " Sorry for the trouble.",
    " Let me know.", " I'd appreciate it.", " It is for a birthday.", " I leave on vacation soon.", " Best, {name}",
    " Regards, {name}", " I hope that makes sense.", " My wife is asking too.", " Nothing else for now.",
]  # fmt: skip
JOINERS = [", and also ", ". also, ", ". one more thing: ", ". second, ", " and then "]
FOLLOWERS = ["ok, ", "great. ", "and ", "thanks. ", "I see. ", "alright, ", "fine, but ", ""]
FRAMES = ["about order {order_id}: ", "it's about order {order_id}. ", "order {order_id}: ", "re {order_id}, "]
REPLIES = [
    "{slot}", "it's {slot}", "sure, {slot}", "that would be {slot}", "oh right, {slot}", "here you go: {slot}",
    "sorry, {slot}", "of course: {slot}", "yes, {slot}", "let me see, {slot}", "{slot} please", "I think {slot}",
]  # fmt: skip

ASKS = {
    "order_id": "Which order is it about? Please send me the order number.",
    "problem": "I'm sorry to hear that. What is wrong with it?",
    "address": "What is the new delivery address?",
    "amount": "Which amount should be refunded?",
    "product": "Which product are you looking for?",
    "phone": "Which phone number should we call?",
    "day": "Which day suits you for the call?",
    "email": "Which email address does the account use?",
}
"""Missing argument → the teacher's question."""

DONE = "Done. Is there anything else I can do for you?"
UNSURE = "I'm not sure I understand. Which order is it about, and what would you like me to do?"

REPORTS = {
    "lookup_order": "Order {order_id} is {status}: {contents}, total ${total}.",
    "track_package": "Your parcel for order {order_id} is at {location} and is {state}. It should arrive {eta}.",
    "cancel_order": "Order {order_id} is cancelled. Your reference is {reference}.",
    "start_return": "The return of order {order_id} is open. Your reference is {reference}.",
    "change_delivery_address": "Order {order_id} will go to {address}.",
    "get_invoice": "The invoice for order {order_id} is on its way.",
    "apply_refund": "I refunded ${amount} for order {order_id}. Your reference is {reference}.",
    "check_stock": "We have {available} of the {product} in stock.",
    "schedule_callback": "We will call {phone} {day}.",
    "reset_password": "A reset link is on its way to {email}.",
}
"""Tool → the teacher's sentence about its arguments and result."""

TICKET: list[list[str]] = [
    ["Hello, this is {name}.", "{name} here.", "My name is {name}.", "Good day, I am {name}, a regular customer."],
    [
        "The {product} from order {order_id} {issue}.",
        "I bought the {product} last month and it {issue}, see order {order_id}.",
        "Unfortunately the {product} {issue}. The order number is {order_id}.",
        "Three days ago I checked order {order_id}: the {product} {issue}.",
        "I am writing about the {product}, which {issue}.",
    ],
    [
        "I am quite disappointed.",
        "It was meant as a gift.",
        "I have photos of it.",
        "This is not the first time.",
        "",
    ],
    ["{Wish}.", "Honestly, {wish}.", "Given all that, {wish}.", "If possible, {wish}."],
]
"""The sentences of a support ticket: who writes, what happened, an aside, a wish."""
