"""Logs into which every known defect was planted a known number of times, and what a dataset makes of them.

The lines go the user's way: ingested into a store, where those that are no records end among the rejects, and then
prepared by the default policy. What is checked is read from the written files by other means than the package's own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from experiments.sample_traffic import CLIENT_ID, SUPPORT, TOOLS, generate
from flywheel_ray.builds import near_leaks
from flywheel_ray.config import Places
from flywheel_ray.datasets import DatasetPolicy, Manifest, load, validate
from flywheel_ray.errors import DatasetError
from flywheel_ray.preparation import prepare
from flywheel_ray.services import LogQuery
from flywheel_ray.stores import open_store
from flywheel_ray.stores.ingest import ingest

pytestmark = pytest.mark.slow

QUERY = LogQuery(client_id=CLIENT_ID, workload_id=SUPPORT)
SPLITS = ("train", "validation", "eval")
Message = dict[str, Any]

QUESTIONS = {
    "card_arrival": """
        My new card still has not arrived.
        How long does delivery of a debit card take?
        I ordered plastic two weeks ago and nothing came in the post.
        Can you track the card you mailed me?
        Is there a way to have my replacement sent by express?
        The postman says he never saw an envelope from you.
        When should I expect the card for my daughter's account?
        Did you really ship it, because my mailbox is empty?
        I moved house last month, could the letter have gone to the old flat?
        What is the tracking number of the shipment?
        Your app claims it was delivered, yet I do not have it.
        Still waiting for the card, this is getting ridiculous.""",
    "pin_blocked": """
        I typed the wrong PIN three times.
        My code is locked, how do I get it open again?
        The cash machine says too many attempts.
        Please unblock my PIN.
        Where can I see my secret number in the app?
        I forgot the four digits for my card.
        Can I choose another PIN at an ATM abroad?
        The terminal refuses my code although it is right.
        Help, I cannot pay because the number is blocked!
        Is it possible to reset the passcode by phone?
        How many tries do I have before it locks?
        My husband entered a bad code and now nothing works.""",
    "transfer_fee_charged": """
        Why was I charged for a transfer?
        There is a fee of two pounds on my statement that I do not recognise.
        I thought sending money inside Europe was free.
        You took a commission when I paid my landlord.
        What does an international payment cost?
        Refund the fee for yesterday's wire, please.
        Nobody told me about charges for moving my own money.
        The amount that reached my sister was smaller than what I sent.
        Is there a cheaper way to send dollars to Canada?
        An extra charge appeared after I sent the rent.
        Do you bill me for standing orders?
        Explain the percentage you keep on each remittance.""",
    "exchange_rate": """
        Which rate do you use for converting currencies?
        The euro rate on my holiday purchase looks wrong.
        Do you add a margin at weekends?
        I got fewer yen than the news said I would.
        When is the conversion fixed, on purchase or on settlement?
        How do I lock in today's rate?
        Please correct the exchange applied to my hotel bill.
        Is the rate in the app live?
        My bank at home gives a much better price for francs.
        Why did the value change between booking and payment?
        Can I see the history of dollar to pound prices?
        What rate applies to cash withdrawn in Norway?""",
    "lost_or_stolen": """
        Somebody took my wallet on the train.
        I cannot find my card anywhere.
        Freeze everything, I was robbed!
        There are payments in a city where I have never been.
        I left my card in a taxi, what now?
        How do I report a theft to you?
        My handbag is gone, and all my cards with it.
        Can you block it until I have searched the car?
        I found it again, can you switch it back on?
        A machine swallowed it and the bank is closed.
        Who pays if a thief used my contactless?
        Send me a new one, the old one was stolen in Rome.""",
    "top_up_failed": """
        My top-up did not go through.
        I added money an hour ago and my balance is unchanged.
        The app rejects my deposit with an error.
        Which cards may I use for adding funds?
        My salary has not shown up in the account.
        Why was the top-up reverted?
        Is there a limit on how much I can load each day?
        The bank took the money but you do not show it.
        Apple Pay refuses to add cash to my wallet here.
        I want to deposit a cheque, how does that work?
        Automatic top-up stopped working since the update.
        Pending for three days, when will my deposit arrive?""",
    "verify_identity": """
        Why do you need a photo of my passport?
        The app does not accept my driving licence.
        How long does checking my identity take?
        I have no document with my current address.
        My selfie is rejected each time.
        Can I prove who I am without an ID?
        What happens to the pictures after verification?
        I changed my surname, must I verify again?
        Verification has been stuck since Monday.
        Is a student card good enough as proof?
        You ask where my money comes from, what should I write?
        The camera goes black when I scan the document.""",
    "close_account": """
        I would like to close my account.
        Delete everything you know about me.
        How do I cancel my subscription to the premium plan?
        Where does the remaining balance go when I leave?
        I am not happy with the service and want out.
        Can my late father's account be shut?
        Is there a fee for terminating early?
        Please do not renew my plan next year.
        I opened a second account by mistake, remove one.
        How can I get my statements once I am no longer a customer?
        Switch me back to the free plan.
        Why can I not deactivate my profile in the settings?""",
}
"""Questions by the queue that the teacher sends them to: what is asked of one queue is put in other words each time."""

OPPOSITES = [
    ("I want to activate my card.", "activate", "I want to deactivate my card.", "block"),
    ("Please turn notifications on for my account.", "alerts_on", "Please turn notifications off for my account.",
     "alerts_off"),
    ("Raise my daily limit to 500.", "raise_limit", "Raise my daily limit to 900.", "ask_why"),
    ("Send 40 dollars to Lena Ortiz.", "pay_lena", "Send 40 dollars to Lena Berg.", "pay_berg"),
    ("Is the shop in Leeds open on Monday?", "hours_monday", "Is the shop in Leeds open on Sunday?", "hours_sunday"),
]  # fmt: skip
"""Nearly the same words, and another answer each: no duplicates."""

ROUTE = {
    "type": "function",
    "function": {
        "name": "route",
        "description": "Send the customer's request to the right queue.",
        "parameters": {
            "type": "object",
            "properties": {"queue": {"type": "string"}, "urgent": {"type": "boolean"}},
            "required": ["queue"],
            "additionalProperties": False,
        },
    },
}

JOURNEY = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "required": required.split()}}}
    for name, required in {
        "search_flights": "from to day", "book_flight": "flight", "find_hotels": "city day", "book_hotel": "room",
    }.items()
]  # fmt: skip

UNICODE = [
    "היכן הכרטיס שהזמנתי לפני שבוע?",
    "أين بطاقتي التي طلبتها الأسبوع الماضي؟",
    "我的银行卡什么时候能到？",
    "👩‍👩‍👧‍👦 lost our cards on holiday 😭😭 what now 🇳🇴",
    "Line separators\u2028and paragraphs\u2029in one message\x85are no line ends",
    "z̷̢a̸l̴g̵o̶ ̷t̸e̴x̵t̶ with marks upon marks",
    "half an emoji \ud83d that a logger cut",
    "a zero\u200bwidth space, a byte order mark \ufeff and a \x00 byte",
    "ﬁne ligatures, ｆｕｌｌｗｉｄｔｈ letters and ²³ superscripts",
]

SYLLABLES = re.findall("..", "badefigolumanepirosutavewixozukaleminopurasetivo")


# ── how users repeat themselves ─────────────────────────────────────────────────────────────────────────────────────


def shouted(rng: Random, text: str) -> str:
    """In capitals."""
    return text.upper()


def unpunctuated(rng: Random, text: str) -> str:
    """Without marks, but for the point in an amount; or with some, where there were none."""
    bare = re.sub(r"(?<!\d)[^\w\s'@#$]|[^\w\s'@#$](?!\d)|(?<=\d)-(?=\d)", "", text)
    return bare if bare != text else f"{text}!!"


def spaced(rng: Random, text: str) -> str:
    """With white space too much."""
    words = text.split()
    at = rng.randrange(1, len(words))
    return " ".join(words[:at]) + "  " + " ".join(words[at:]) + rng.choice(["\n", " ", "\t"])


def mistyped(rng: Random, text: str) -> str:
    """A word with two neighbouring letters swapped, or one left out, or doubled."""
    word = rng.choice(list(re.finditer(r"[A-Za-z]{4,}", text)))
    at = word.start() + rng.randrange(1, len(word[0]) - 1)
    a, b = text[at], text[at + 1]
    return text[:at] + rng.choice([b + a if a != b else a, b, a + a + b]) + text[at + 2 :]


def polite(rng: Random, text: str) -> str:
    """With a greeting or thanks."""
    return rng.choice(["hi, {}", "Hello! {}", "{} please", "{} Thanks", "please {}", "hey {}"]).format(text)


def shortened(rng: Random, text: str) -> str:
    """A short word left out."""
    words = text.split()
    short = [i for i, word in enumerate(words) if word.isalpha() and len(word) <= 4] or [0]
    del words[rng.choice(short)]
    return " ".join(words)


HABITS: list[Callable[[Random, str], str]] = [shouted, unpunctuated, spaced, mistyped, polite, shortened]


# ── the corpus ──────────────────────────────────────────────────────────────────────────────────────────────────────


def called(name: str, arguments: Any, id: str = "call_0") -> Message:
    """An assistant message with one tool call."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": text}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": id, "type": "function", "function": function}]}


def said(text: Any, role: str = "user") -> Message:
    return {"role": role, "content": text}


def routed(queue: str) -> Message:
    return called("route", {"queue": queue})


class Corpus:
    """Log lines, and the plan of what was planted.

    Attributes:
        rejected: reason → number of lines that are no records.
        again: lines that were written twice.
        excluded: reason → number of records planted for it; near-duplicates are not among them.
        usable: the messages of every request that shall be kept, or be a near-duplicate.
        repeats: a question → the words in which other users repeated it.
        loops: the requests of each agent loop.
        conflicts: a user's text → the queues that the teacher sent it to, in order of time, a letter each.
        answers: a user's text → the queue that its row must have.
        faults: a user's text → what is wrong with the call that answers it.
    """

    def __init__(self, seed: int = 0) -> None:
        self.lines: list[bytes] = []
        self.rejected: Counter[str] = Counter()
        self.again = 0
        self.excluded: Counter[str] = Counter()
        self.usable: list[list[Message]] = []
        self.repeats: dict[str, list[str]] = {}
        self.loops: list[list[list[Message]]] = []
        self.conflicts: dict[str, str] = {}
        self.answers: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self._rng = Random(seed)
        self._clock = 1_788_000_000.0
        for plant in (
            self._plant_traffic, self._plant_repeats, self._plant_others, self._plant_loops, self._plant_duplicates,
            self._plant_conflicts, self._plant_faults, self._plant_unusable, self._plant_forms, self._plant_unicode,
            self._plant_large, self._plant_unreadable,
        ):  # fmt: skip
            plant()

    def _log(self, asked: Sequence[Message] | str, answer: Message, **changes: Any) -> dict[str, Any]:
        """Write a line. `changes` are to fields of the hit, and to fields of its request where it is `request=`."""
        hit = self._hit(asked, answer, **changes)
        self._write(hit)
        return hit

    def _keep(self, asked: Sequence[Message] | str, answer: Message, **changes: Any) -> None:
        """Write a line that is of use."""
        self.usable.append(self._log(asked, answer, **changes)["request"]["messages"])

    def _hit(self, asked: Sequence[Message] | str, answer: Message, **changes: Any) -> dict[str, Any]:
        self._clock += self._rng.uniform(5, 60)
        messages = [said("You route customers.", "system"), said(asked)] if isinstance(asked, str) else list(asked)
        request = {"model": "teacher", "messages": messages, "tools": [ROUTE], **changes.pop("request", {})}
        finish = changes.pop("finish", "tool_calls" if answer.get("tool_calls") else "stop")
        return {
            "timestamp": round(self._clock, 3),
            "client_id": CLIENT_ID,
            "workload_id": SUPPORT,
            "request": request,
            "response": {
                "id": f"chatcmpl-{self._rng.getrandbits(48):012x}",
                "choices": [{"index": 0, "message": answer, "finish_reason": finish}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 20},
            },
            "latency_s": 1.0,
            **changes,
        }

    def _write(self, hit: Any) -> None:
        self.lines.append(json.dumps(hit).encode())

    def _text(self, words: int = 9) -> str:
        """Words that nobody else says."""
        return " ".join("".join(self._rng.choices(SYLLABLES, k=self._rng.randint(2, 4))) for _ in range(words))

    # Each method plants one kind of thing.

    def _plant_traffic(self) -> None:
        """Sample traffic, of which every conversation begins with another order, address or number."""
        self._first_calls: list[dict[str, Any]] = []
        begun: set[str] = set()
        telling = False
        for hit in generate(3_000, seed=5, workload="support"):
            messages, answer = hit["request"]["messages"], hit["response"]["choices"][0]["message"]
            if len(messages) == 2:
                calls = json.dumps(answer.get("tool_calls"))
                telling = (
                    bool(re.search(r"\d{3}|@", re.sub(r"call_\w+", "", calls))) and messages[1]["content"] not in begun
                )
                begun.add(messages[1]["content"])
                if telling:
                    self._first_calls.append(hit)
            if telling:
                self._write(hit)
                self.usable.append(messages)

    def _plant_repeats(self) -> None:
        """Questions that others ask again in nearly the same words, and that the teacher answers the same."""
        for queue, lines in QUESTIONS.items():
            for question in map(str.strip, lines.strip().splitlines()):
                self._keep(question, routed(queue))
                for habit in self._rng.sample(HABITS, 3):
                    self._repeat(question, habit(self._rng, question), queue)
        for hit in self._rng.sample(self._first_calls, 200):
            system, user = hit["request"]["messages"]
            text = self._rng.choice(HABITS)(self._rng, user["content"])
            self.repeats.setdefault(user["content"], []).append(text)
            answer = hit["response"]["choices"][0]["message"]
            self._keep([system, said(text)], answer, request={"tools": TOOLS})

    def _repeat(self, question: str, text: str, queue: str) -> None:
        self.repeats.setdefault(question, []).append(text)
        self._keep(text, routed(queue))

    def _plant_others(self) -> None:
        """Questions that are nearly the same and are not: they have other answers, or are about another number."""
        for one, queue, other, another in OPPOSITES:
            self._keep(one, routed(queue))
            self._keep(other, routed(another))
        for i in range(40):
            self._keep(
                f"Where is my parcel {48_210 + i if i % 2 else self._rng.randint(10_000, 99_999)}?", routed("parcels")
            )

    def _plant_loops(self) -> None:
        """Agents in five steps; of twenty, another user begins the same way: ten go the same way, ten do not."""
        for i in range(100):
            task = self._task(i)
            results = self._results()
            self._loop(task, results, usable=range(5))
            if i < 10:
                self._loop(task, results, usable=())
                self.excluded["duplicate request"] += 5
            elif i < 20:
                self._loop(task, self._results(), usable=range(1, 5))
                self.excluded["duplicate request"] += 1

    def _task(self, i: int) -> tuple[str, str, str, str]:
        ways = [
            "Book {} a flight from {} to {} on {} and a hotel near the station.",
            "{} has to travel from {} to {}, leaving {}. Arrange everything.",
            "I need a business trip for {}: {} to {}, {}, one night.",
            "Please organise the journey of {} ({} → {}, {}) including a room.",
        ]
        name, start, end = (self._text(words).title() for words in (2, 1, 1))
        day = f"2026-{self._rng.randint(10, 12)}-{self._rng.randint(10, 28)}"
        return ways[i % len(ways)].format(name, start, end, day), start, end, day

    def _results(self) -> list[dict[str, Any]]:
        rng = self._rng
        flight, room = (f"{rng.getrandbits(32):08x}" for _ in range(2))
        return [
            {
                "flights": [
                    {"id": flight, "departs": f"{rng.randint(5, 22)}:{rng.randint(10, 59)}", "eur": rng.random()}
                ]
            },
            {"booked": flight, "seat": f"{rng.randint(1, 40)}{rng.choice('ABCDEF')}", "reference": self._text(2)},
            {"hotels": [{"id": room, "name": self._text(2).title(), "eur": rng.random()}]},
            {"booked": room, "check_in": f"from {rng.randint(1, 6)} pm", "reference": self._text(2)},
        ]

    def _loop(self, task: tuple[str, str, str, str], results: Sequence[dict[str, Any]], usable: Sequence[int]) -> None:
        text, start, end, day = task
        flight, room = results[0]["flights"][0]["id"], results[2]["hotels"][0]["id"]
        steps = [
            ("search_flights", {"from": start, "to": end, "day": day}),
            ("book_flight", {"flight": flight}),
            ("find_hotels", {"city": end, "day": day}),
            ("book_hotel", {"room": room}),
        ]
        answers = [called(name, values, f"call_{self._rng.getrandbits(96):024x}") for name, values in steps]
        done = said(f"All set: flight {flight}, room {room}.", "assistant")
        messages = [said("You book journeys. Call one tool at a time.", "system"), said(text)]
        requests = []
        for step, answer in enumerate([*answers, done]):
            hit = self._log(messages, answer, request={"tools": JOURNEY})
            requests.append(hit["request"]["messages"])
            if step in usable:
                self.usable.append(requests[-1])
            if step < 4:
                id = answer["tool_calls"][0]["id"]
                result = {"role": "tool", "tool_call_id": id, "content": json.dumps(results[step])}
                messages = [*messages, answer, result]
        self.loops.append(requests)

    def _plant_duplicates(self) -> None:
        """The same request at another time, with other settings that are no part of what was asked."""
        for i in range(37):
            text = self._text()
            self._keep(text, routed("card_arrival"))
            for _ in range(1 + i % 3):
                self._log(text, routed("card_arrival"), request={"temperature": self._rng.random(), "user": f"u{i}"})
                self.excluded["duplicate request"] += 1

    def _plant_conflicts(self) -> None:
        """The same request with other answers: the most frequent one counts, and of equals the latest."""
        for answers, winner, times in (("ABA", "A", 8), ("AB", "B", 3), ("AABBB", "B", 2), ("ABCABCA", "A", 1)):
            for _ in range(times):
                text = self._text()
                self.conflicts[text], self.answers[text] = answers, winner
                for answer in answers:
                    self._log(text, routed(answer))
                self.usable.append([said(text)])
                self.excluded["other answer to the same request"] += len(answers) - answers.count(winner)
                self.excluded["duplicate request"] += answers.count(winner) - 1

    def _plant_faults(self) -> None:
        """Calls of tools that were not offered, and arguments that break the schema."""
        bad = [
            ("unknown_tool", called("rout", {"queue": "a"}), 6),
            ("schema_violation", called("route", {"queue": 7}), 5),
            ("schema_violation", called("route", {}), 4),
            ("schema_violation", called("route", {"queue": "a", "mood": "bad"}), 3),
        ]
        two = routed("a")
        two["tool_calls"] += called("transfer", {"to": "b"}, "call_1")["tool_calls"]
        for kind, answer, times in [*bad, ("unknown_tool", two, 2)]:
            for _ in range(times):
                text = self._text()
                self._log(text, answer)
                self.faults[text] = kind
        text = self._text()
        self._log(text, routed("a"), request={"tools": []})
        self.faults[text] = "unknown_tool"
        self.excluded["invalid tool call"] = len(self.faults)

    def _plant_unusable(self) -> None:
        """Records that are no whole answer of the teacher's."""
        kinds: list[tuple[str, int, Message, dict[str, Any]]] = [
            ("truncated answer", 5, said("The card will arr", "assistant"), {"finish": "length"}),
            ("content filtered", 3, said("The", "assistant"), {"finish": "content_filter"}),
            ("refused answer", 4, {"role": "assistant", "content": None, "refusal": "I cannot help."}, {}),
            ("empty answer", 6, said(" \n", "assistant"), {}),
            ("tool arguments are not an object", 3, called("route", "{queue: a}"), {"arm": "teacher"}),
            ("shadow copy", 3, routed("a"), {"served_by": "student", "arm": "s", "shadow": True, "exchange_id": "x"}),
            ("served by an arm", 5, routed("a"), {"served_by": "student", "arm": "s"}),
            ("failed exchange", 2, routed("a"), {"error": "timeout", "response": {}}),
        ]
        for reason, times, answer, changes in kinds:
            for _ in range(times):
                self._log(self._text(), answer, **changes)
                self.excluded[reason] += 1
        for _ in range(2):
            self._log(self._text(), {}, response=streamed(routed("card_arrival"))[:-2])
            self.excluded["interrupted stream"] += 1
        self.elsewhere = 7
        for i in range(self.elsewhere):
            self._log(self._text(), routed("a"), **({"client_id": "other"} if i % 2 else {"workload_id": "other"}))

    def _plant_forms(self) -> None:
        """Whole answers in every form that loggers and older APIs give them."""
        for i in range(6):
            self.answers[text := self._text()] = f"stream {i}"
            self._keep(text, {}, response=streamed(routed(f"stream {i}")))
        self.several = 7
        for i in range(self.several):
            self.answers[text := self._text()] = f"choice {i}"
            choices = [{"index": n, "message": routed(f"choice {i + n}"), "finish_reason": "stop"} for n in range(3)]
            self._keep(text, {}, response={"choices": choices})
        for i in range(5):
            self.answers[text := self._text()] = f"legacy {i}"
            older = {"name": "route", "arguments": json.dumps({"queue": f"legacy {i}"})}
            asked = [
                said(text),
                {"role": "assistant", "content": None, "function_call": {"name": "route", "arguments": "{}"}},
                {"role": "function", "name": "route", "content": "no queue was given"},
            ]
            request = {"functions": [ROUTE["function"]], "tools": None}
            self._keep(asked, {"role": "assistant", "content": None, "function_call": older}, request=request)
        self.images = 4
        for _ in range(self.images):
            self.answers[text := self._text()] = "image"
            url = f"data:image/png;base64,{self._rng.getrandbits(400):0100x}"
            parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
            self._keep([said(parts)], routed("image"))
        for i in range(4):
            self.answers[text := self._text()] = f"object {i}"
            answer = routed("")
            answer["tool_calls"][0]["function"]["arguments"] = {"queue": f"object {i}"}
            self._keep([said([{"type": "text", "text": text}])], answer)
        for i in range(2):
            self.answers[text := self._text()] = f"gateway {i}"
            changes = {"served_by": "teacher", "arm": "teacher", "exchange_id": f"e{i}", "rollout": "r"}
            self._keep(text, routed(f"gateway {i}"), **changes)

    def _plant_unicode(self) -> None:
        for text in UNICODE:
            self._keep(text, routed("unicode"))
            self.answers[text] = "unicode"
        composed = "Où est passée ma carte bancaire commandée à Orléans ?"
        self._keep(composed, routed("unicode"))
        self._repeat(composed, unicodedata.normalize("NFD", composed), "unicode")
        self.answers[text := self._text()] = "half \ud83d"
        self._keep(text, routed("half \ud83d"))

    def _plant_large(self) -> None:
        """Prompts of a megabyte, one of them twice but for a word."""
        for i in range(2):
            lines = [f"{self._rng.getrandbits(64):016x} {self._text(8)}" for _ in range(500)]
            text = "\n".join(f"{n} {line}" for n in range(30) for line in lines)
            self._keep(text, routed("large"))
            if i == 0:
                self._repeat(text, "please " + text, "large")

    def _plant_unreadable(self) -> None:
        """Lines that are no records."""

        def reject(line: bytes, reason: str) -> None:
            self.lines.append(line)
            self.rejected[reason] += 1

        def bad(reason: str, answer: Message | None = None, **changes: Any) -> None:
            hit = {**self._hit(self._text(), answer or routed("a")), **changes}
            reject(json.dumps({k: v for k, v in hit.items() if v is not None}).encode(), reason)

        whole = json.dumps(self._hit(self._text(), routed("a"))).encode()
        for line in (whole[:200], whole[:-1], b"{", whole.replace(b"1.0", b"NaN"), b"\xff\xfe{}", b"null}"):
            reject(line, "not JSON")
        reject(b"[1, 2]", "the line is a list, not an object")
        deep: Any = "x"
        for _ in range(150):
            deep = [deep]
        bad("the line nests deeper than 100 levels", more=deep)
        arguments = "response.choices[].message.tool_calls[].function.arguments is not a JSON object"
        for text in ('{"queue": "a"', "{queue: a}", "[]", "a", '{"queue": NaN}', '"a"', "None"):
            bad(arguments, called("route", text))
        for _ in range(2):
            bad("response is missing", response=None)
            bad("response.choices is missing or empty", response={"error": {"message": "overloaded"}})
            bad("request.messages is empty", request={"messages": []})
        bad("response.choices is missing or empty", response=[{"object": "chat.completion.chunk", "choices": []}])
        bad("timestamp is not a time in epoch seconds (milliseconds?)", timestamp=1_788_000_000_123)
        bad("client_id is missing", client_id=None)
        bad("request.messages[] is not an object with a role", request={"messages": [{"content": "hi"}]})
        self.lines += [b"", b"  "]
        self.again = 4
        self.lines += self.lines[: self.again]


def streamed(answer: Message) -> list[dict[str, Any]]:
    """An answer with one call as the chunks of a stream, its arguments in pieces."""
    function = answer["tool_calls"][0]["function"]
    first = {"index": 0, "id": "call_0", "type": "function", "function": {"name": function["name"], "arguments": ""}}
    pieces = [function["arguments"][i : i + 5] for i in range(0, len(function["arguments"]), 5)]
    deltas: list[tuple[Any, str | None]] = [({"role": "assistant", "content": None, "tool_calls": [first]}, None)]
    deltas += [({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}, None) for piece in pieces]
    chunks = [
        {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        for delta, finish in [*deltas, ({}, "tool_calls")]
    ]
    return [*chunks, {"object": "chat.completion.chunk", "choices": [], "usage": {"prompt_tokens": 9}}]


# ── what became of it ───────────────────────────────────────────────────────────────────────────────────────────────


class Built:
    """The corpus, what ingesting it said, and the dataset that the default policy made of it."""

    def __init__(self, home: Path) -> None:
        self.corpus = Corpus()
        self.places = Places(runs=home, store=str(home / "logs.db"))
        self.rejects = home / "rejects.jsonl"
        store = open_store(self.places.store)
        self.summary = ingest(self.corpus.lines, "corpus.jsonl", store, self.rejects)
        store.close()
        self.folder = prepare(self.places, QUERY, DatasetPolicy())
        self.manifest = load(self.folder).manifest
        self.rows = rows_of(self.folder)

    def exactly(self, **settings: Any) -> tuple[Manifest, list[Row]]:
        """The manifest and rows of a dataset by another policy, with near-duplicates kept."""
        folder = prepare(self.places, QUERY, DatasetPolicy(near_duplicates=None, **settings))
        return load(folder).manifest, rows_of(folder)


class Row(NamedTuple):
    split: str
    data: dict[str, Any]

    @property
    def said(self) -> str:
        return first_said(self.data["messages"])

    @property
    def key(self) -> str:
        return key_of(self.data["messages"])

    @property
    def calls(self) -> list[dict[str, Any]]:
        return self.data["reference"]["tool_calls"]


def rows_of(folder: Path) -> list[Row]:
    return [Row(name, json.loads(line)) for name in SPLITS for line in (folder / f"{name}.jsonl").open("rb")]


def first_said(messages: Sequence[Message]) -> str:
    return text_of(next(message for message in messages if message["role"] == "user"))


def text_of(message: Message) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return whole(re.sub(r"\[image_url sha256:\w+\]", "", text))


def whole(text: str) -> str:
    """Text with U+FFFD for half characters, which no file can hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def key_of(messages: Sequence[Message]) -> str:
    """A request by what was said and called, without ids and system prompts, and whatever the form it is in."""
    key = []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls") or ()] or [message.get("function_call")]
        if message["role"] not in ("system", "developer"):
            key.append([text_of(message), [[call["name"], call["arguments"]] for call in calls if call]])
    return json.dumps(key)


def near_pairs(rows: Sequence[Row], similarity: float) -> list[tuple[str, str]]:
    """What was said in an evaluation row and in one of another side with the same answer, the same digits and nearly
    the same trigrams. Compares all of them."""
    groups: dict[str, list[tuple[Row, set[str]]]] = {}
    for row in rows:
        words = " ".join(text_of(message) for message in row.data["messages"] if message["role"] != "system")
        text = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", words).casefold()))
        digits = "".join(re.findall(r"\d", text))
        group = json.dumps([len(row.data["messages"]), row.data["reference"]["text"], row.calls, digits])
        groups.setdefault(group, []).append((row, {text[i : i + 3] for i in range(len(text) - 2)}))
    return [
        (one.said, other.said)
        for group in groups.values()
        for one, grams in group
        for other, others in group
        if one.split == "eval" != other.split and len(grams & others) >= similarity * len(grams | others)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("planted"))


def test_every_line_has_its_place(built: Built) -> None:
    corpus, summary, manifest = built.corpus, built.summary, built.manifest
    assert Counter(summary.reasons) == corpus.rejected
    assert summary.duplicates == corpus.again
    blank = sum(not line.strip() for line in corpus.lines)
    assert summary.lines == len(corpus.lines) - blank == summary.added + summary.duplicates + summary.rejected
    for reject in map(json.loads, built.rejects.open("rb")):
        line = corpus.lines[reject["line_number"] - 1]
        assert reject["reason"] and reject["line"] == line.decode("utf-8", "backslashreplace")
    assert manifest.scanned == summary.added - corpus.elsewhere
    assert (
        manifest.rows.total == len(built.rows)
        and manifest.rows.total + sum(manifest.excluded.values()) == manifest.scanned
    )


def test_every_loss_has_the_reason_it_was_planted_for(built: Built) -> None:
    corpus, manifest = built.corpus, built.manifest
    near = {reason: count for reason, count in manifest.excluded.items() if reason.startswith("near-duplicate")}
    assert manifest.excluded == {**corpus.excluded, **near}
    assert sum(near.values()) == len(corpus.usable) - len(built.rows)
    assert manifest.several_choices == corpus.several
    assert manifest.conflicting_requests == len(corpus.conflicts)


def test_all_five_steps_of_every_agent_loop_are_kept(built: Built) -> None:
    kept = {row.key for row in built.rows}
    steps = [[key_of(request) in kept for request in loop] for loop in built.corpus.loops]
    assert len(steps) == 120 and steps == [[True] * 5] * 120
    # As many as were planted, each once: of those that went the same way twice only one.
    planted = {key_of(request) for loop in built.corpus.loops for request in loop}
    assert len(planted) == 100 * 5 + 10 * 4
    assert sum(row.key in planted for row in built.rows) == len(planted)


def test_near_duplicates_are_found_and_nothing_else(built: Built) -> None:
    kept = {row.key for row in built.rows}
    questions = [[key_of([said(text)]) for text in (one, *others)] for one, others in built.corpus.repeats.items()]
    planted = sum(len(keys) - 1 for keys in questions)
    found = sum(len(keys) - max(1, sum(key in kept for key in keys)) for keys in questions)
    # A question of which no wording is left was taken for another one.
    wrong = [keys[0] for keys in questions if not any(key in kept for key in keys)]
    repeated = {key for keys in questions for key in keys}
    wrong += [key for key in map(key_of, built.corpus.usable) if key not in kept | repeated]
    assert planted > 450
    assert found >= 0.95 * planted, f"{found} of {planted}"
    assert len(wrong) <= 0.01 * found, f"{len(wrong)} of {found}: {wrong[:5]}"


def test_no_conversation_and_nearly_no_question_is_on_two_sides(built: Built) -> None:
    sides: dict[str, set[str]] = {}
    for row in built.rows:
        sides.setdefault(" ".join(row.said.split()).casefold(), set()).add(row.split)
    assert len(sides) == built.manifest.conversations.total and len(built.rows) > len(sides) + 400
    assert all(len(found) == 1 for found in sides.values())
    assert {name for found in sides.values() for name in found} == set(SPLITS)
    assert near_pairs([row for row in built.rows if len(row.said) < 10_000], similarity=0.9) == []
    _, exact = built.exactly()
    assert len(near_pairs([row for row in exact if len(row.said) < 10_000], similarity=0.9)) > 50


def test_the_answer_that_counts_is_the_planted_one(built: Built) -> None:
    given = {row.said: row.calls for row in built.rows}
    for text, queue in built.corpus.answers.items():
        assert given[whole(text)] == [{"name": "route", "arguments": {"queue": whole(queue)}}]


def test_conflicting_answers_by_other_policies(built: Built) -> None:
    conflicts = built.corpus.conflicts
    elsewhere = built.corpus.excluded["duplicate request"]
    elsewhere -= sum(answers.count(built.corpus.answers[text]) - 1 for text, answers in conflicts.items())
    manifest, rows = built.exactly(conflicts="latest")
    given = {row.said: row.calls[0]["arguments"]["queue"] for row in rows if row.said in conflicts}
    assert given == {text: answers[-1] for text, answers in conflicts.items()}
    lost = sum(len(answers) - answers.count(answers[-1]) for answers in conflicts.values())
    again = sum(answers.count(answers[-1]) - 1 for answers in conflicts.values())
    assert manifest.excluded["other answer to the same request"] == lost
    assert manifest.excluded["duplicate request"] == elsewhere + again
    manifest, rows = built.exactly(conflicts="drop")
    assert not [row for row in rows if row.said in conflicts]
    assert manifest.excluded["other answer to the same request"] == sum(map(len, conflicts.values()))
    assert manifest.excluded["duplicate request"] == elsewhere


def test_invalid_calls_are_dropped_kept_or_left_to_evaluation(built: Built) -> None:
    faults = built.corpus.faults
    assert not [row for row in built.rows if row.said in faults]
    manifest, rows = built.exactly(invalid_calls="keep")
    assert {row.said: row.data["faults"] for row in rows if "faults" in row.data} == {t: [k] for t, k in faults.items()}
    assert manifest.faults == Counter(faults.values()) and "invalid tool call" not in manifest.excluded
    manifest, rows = built.exactly(invalid_calls="eval_only")
    left = [row for row in rows if row.said in faults]
    assert {row.split for row in left} == {"eval"}
    assert manifest.excluded["invalid tool call, on the training side"] == len(faults) - len(left) > 0


def test_media_are_kept_as_a_hash_or_dropped(built: Built) -> None:
    hashes = {
        found for row in built.rows for found in re.findall(r"\[image_url sha256:\w{32}\]", str(row.data["messages"]))
    }
    assert len(hashes) == built.corpus.images
    manifest, rows = built.exactly(media="drop")
    assert manifest.excluded["request has images or other media"] == built.corpus.images
    assert "image_url" not in str([row.data["messages"] for row in rows])


def test_text_is_kept_as_it_was_said(built: Built) -> None:
    texts = {row.said for row in built.rows}
    assert {whole(text) for text in UNICODE} <= texts
    large = [text for text in texts if len(text) > 1_000_000]
    assert len(large) == 2


def test_the_dataset_is_valid_until_somebody_moves_a_row(built: Built, tmp_path: Path) -> None:
    validate(load(built.folder))
    near_leaks(load(built.folder))
    size = Counter(row.data["conversation"] for row in built.rows if row.split == "train")
    loop = next(row for row in built.rows if row.split == "train" and size[row.data["conversation"]] == 5)
    alone = next(row for row in built.rows if row.split == "train" and size[row.data["conversation"]] == 1)
    with pytest.raises(DatasetError, match="not the file that was written"):
        load(moved(built.folder, tmp_path / "unrepaired", loop, repair=()))
    with pytest.raises(DatasetError, match="rows, not as the manifest says"):
        validate(load(moved(built.folder, tmp_path / "hashes", alone, repair=("files",))))
    with pytest.raises(DatasetError, match=r"row \w+ of eval leaks"):
        validate(load(moved(built.folder, tmp_path / "loop", loop, repair=("files", "rows"))))
    with pytest.raises(DatasetError, match="fingerprint"):
        validate(load(moved(built.folder, tmp_path / "alone", alone, repair=("files", "rows"))))


def moved(folder: Path, copy: Path, row: Row, repair: Sequence[str]) -> Path:
    """A copy of a dataset in which a row of train is one of eval, with these fields of the manifest repaired."""
    shutil.copytree(folder, copy)
    train, others = copy / "train.jsonl", copy / "eval.jsonl"
    lines = train.read_bytes().splitlines(keepends=True)
    line = next(line for line in lines if row.data["id"].encode() in line[:60])
    train.write_bytes(b"".join(other for other in lines if other != line))
    others.write_bytes(b"".join(sorted([*others.read_bytes().splitlines(keepends=True), line])))
    manifest = json.loads((copy / "manifest.json").read_bytes())
    if "files" in repair:
        for path in (train, others):
            manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    if "rows" in repair:
        manifest["rows"]["train"] -= 1
        manifest["rows"]["eval"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_near_duplicates_that_were_let_through_are_found_afterwards(built: Built, tmp_path: Path) -> None:
    folder = prepare(built.places, QUERY, DatasetPolicy(near_duplicates=None))
    near_leaks(load(folder))  # looks for nothing, as the policy keeps them
    shutil.copytree(folder, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["policy"]["near_duplicates"] = DatasetPolicy().model_dump()["near_duplicates"]
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="nearly repeat one on another side"):
        near_leaks(load(tmp_path / "copy"))
