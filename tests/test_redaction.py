"""Redaction: what is found and what is left alone, and that arguments still match their prompts afterwards."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flywheel_ray import presidio
from flywheel_ray.errors import ConfigError
from flywheel_ray.redaction import KINDS, Presidio, Redaction, Redactor
from flywheel_ray.values import content_hash

REDACTOR = Redactor(Redaction())


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str = "", *arguments: Any) -> dict[str, Any]:
    return {"text": text, "tool_calls": [{"name": "f", "arguments": a} for a in arguments]}


def redact_text(text: str, redactor: Redactor = REDACTOR) -> str:
    messages, _, _ = redactor.redact([user(text)], answer())
    return messages[0]["content"]


def luhn_holds(digits: str) -> bool:
    """Luhn as in ISO/IEC 7812-1: from the right, every second digit doubled, the digits' sum divisible by ten."""
    return sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


# ── configuration ────────────────────────────────────────────────────────────


def test_a_configuration_is_json_and_names_one_behaviour() -> None:
    one = Redaction(kinds=("card", "email"), patterns={"b": "B[0-9]", "a": "A[0-9]"}, presidio=Presidio())
    two = Redaction(kinds=("email", "card"), patterns={"a": "A[0-9]", "b": "B[0-9]"}, presidio=Presidio())
    assert Redaction.model_validate(json.loads(one.model_dump_json())) == one == two
    assert content_hash(one.model_dump(mode="json")) == content_hash(two.model_dump(mode="json"))
    assert Redaction().kinds == KINDS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patterns": {"account": "["}}, "pattern 'account' is no regular expression: unterminated"),
        ({"patterns": {"account": "[0-9]*"}}, "pattern 'account' matches the empty text"),
        ({"patterns": {"Account": "[0-9]+"}}, "pattern 'Account': a name is lower-case"),
        ({"patterns": {"phone": "[0-9]+"}}, "pattern 'phone': that is the name of a built-in kind"),
        ({"presidio": {"entities": ["person"]}}, "'person' is no name of a Presidio entity"),
        ({"kinds": ["iban"]}, "'email', 'phone', 'card' or 'key'"),
        ({"engine": "presidio"}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_configuration_names_what_is_wrong(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        Redaction.model_validate(config)


def test_only_the_kinds_asked_for_are_replaced() -> None:
    text = "bob@acme.com, 415-555-0123, 4111 1111 1111 1111, ghp_" + "a1B2" * 9
    for kind in KINDS:
        _, _, counts = Redactor(Redaction(kinds=(kind,))).redact([user(text)], answer())
        assert counts == {kind: 1}
    assert redact_text(text, Redactor(Redaction(kinds=()))) == text


def test_a_redactor_can_be_sent_to_a_worker() -> None:
    redactor = pickle.loads(pickle.dumps(Redactor(Redaction(patterns={"account": "ACC-[0-9]+"}))))
    assert redact_text("ACC-7 of bob@acme.com", redactor) == "<ACCOUNT_1> of person1@example.com"


# ── one request ──────────────────────────────────────────────────────────────


def test_arguments_still_match_their_prompt() -> None:
    messages = [
        {"role": "system", "content": "Help. Today is 2026-09-01."},
        user("I'm Bob@Acme.com, phone (415) 555-0123, card 4111 1111 1111 1111."),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_4155550123",
                    "type": "function",
                    "function": {"name": "find", "arguments": '{"phone": "+1 415-555-0123",  "n": 1.0}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_4155550123", "content": '{"card":4111111111111111,"id":4155550124}'},
    ]
    reference = {
        **answer("Done, bob@acme.com.", {"to": "bob@acme.com", "card": 4111111111111111, "again": [4155550123, "7"]}),
        "reasoning": "The number 14155550123 is Bob's; eve@acme.com is not.",
    }
    new, redacted, counts = REDACTOR.redact(messages, reference)
    assert new == [
        messages[0],
        user("I'm person1@example.com, phone (202) 555-0101, card 4000 0000 0000 0010."),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_4155550123",
                    "type": "function",
                    "function": {"name": "find", "arguments": '{"phone": "+1 202-555-0101",  "n": 1.0}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_4155550123", "content": '{"card":4000000000000010,"id":4155550124}'},
    ]
    assert redacted == {
        **answer(
            "Done, person1@example.com.",
            {"to": "person1@example.com", "card": 4000000000000010, "again": [2025550101, "7"]},
        ),
        "reasoning": "The number 12025550101 is Bob's; person2@example.com is not.",
    }
    assert counts == {"email": 4, "phone": 4, "card": 3}
    assert new[0] is messages[0]


def test_nothing_found_is_nothing_touched() -> None:
    messages = [user("Where is order 1234567890 of 2024-01-15?"), {"role": "tool", "content": '{"ok": true}'}]
    reference = answer("Let me see.", {"order_id": "1234567890", "at": 1755000074.5}, "{broken")
    new, redacted, counts = REDACTOR.redact(messages, reference)
    assert new is messages and redacted is reference and counts == Counter()
    new, redacted, counts = REDACTOR.redact(messages, answer("Ask bob@acme.com."))
    assert new is messages and redacted == answer("Ask person1@example.com.")


def test_later_turns_keep_their_numbers_and_equal_questions_become_equal() -> None:
    first = [user("I am bob@acme.com or b@acme.com")]
    reference = answer("Call 415-555-0123.", {"to": "b@acme.com"})
    later = [
        *first,
        {"role": "assistant", "content": "Call 415-555-0123.", "tool_calls": []},
        user("or eve@acme.com, 415-555-0124"),
    ]
    short, redacted, _ = REDACTOR.redact(first, reference)
    long, _, _ = REDACTOR.redact(later, answer())
    assert long[0] == short[0] and long[1]["content"] == redacted["text"] == "Call 202-555-0101."
    assert long[2] == user("or person3@example.com, 202-555-0102")
    other, _, _ = REDACTOR.redact([user("I am amy@acme.com or a@acme.com")], answer())
    assert other == short


def test_reasoning_does_not_shift_the_numbers_of_what_later_turns_repeat() -> None:
    reference = {"reasoning": "Not eve@acme.com.", **answer("Ask bob@acme.com.")}
    _, redacted, _ = REDACTOR.redact([user("Whom?")], reference)
    assert redacted == {"reasoning": "Not person2@example.com.", **answer("Ask person1@example.com.")}


def test_stand_ins_that_stand_in_the_text_already_are_skipped() -> None:
    redactor = Redactor(Redaction(patterns={"account": "ACC-[0-9]+"}))
    taken = "person1@example.com, 202-555-0101, 4000 0000 0000 0010, <ACCOUNT_1>, ghp_" + "1".rjust(36, "0")
    new = "bob@acme.com, 415-555-0123, 4111 1111 1111 1111, ACC-9, ghp_" + "a1B2" * 9
    expected = "person2@example.com, 202-555-0102, 4000 0000 0000 0028, <ACCOUNT_2>, ghp_" + "2".rjust(36, "0")
    assert redact_text(f"{new} / {taken}", redactor) == f"{expected} / {taken}"
    # A number that would be one of ours, though it has no form of a phone here.
    assert redact_text("order 2025550101, call 415-555-0123") == "order 2025550101, call 202-555-0102"
    messages, _, _ = REDACTOR.redact([user("415-555-0123")], answer("", {"order": 2025550101}))
    assert messages == [user("202-555-0102")]


def test_json_is_changed_only_where_something_was_found() -> None:
    source = (
        '{ "e\\u006dail" :"caf\\u00e9 %s", "bob@acme.com": [1.50, 1e3, -7, "\\/", "é"],\n'
        '"deep":"{\\"to\\": \\"%s\\"}", "é": "é %s" }'
    )
    value, stand_in = "bob@acme.com", "person1@example.com"
    assert json.loads(source % ((value,) * 3))["deep"] == '{"to": "bob@acme.com"}'
    assert redact_text(source % ((value,) * 3)) == source % ((stand_in,) * 3)


def test_text_that_is_no_json_is_read_as_text() -> None:
    assert redact_text('{"to": "bob@acme.com"') == '{"to": "person1@example.com"'
    assert redact_text('Got "x:\\nbob@acme.com\\n415-555-0123"') == 'Got "x:\\nperson1@example.com\\n202-555-0101"'
    assert redact_text("[" * 100_000 + "bob@acme.com").endswith("[person1@example.com")
    assert redact_text('{"n": ' + "1" * 5000 + ', "to": "bob@acme.com"}').endswith('"person1@example.com"}')


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"phone": "412-4745"}, {"phone": "555-0101"}),
        ({"phone": 4155550123}, {"phone": 2025550101}),
        ({"customerPhoneNumber": "4155550123"}, {"customerPhoneNumber": "2025550101"}),
        ({"phones": ["4155550123", "+44 20 7946 0958"]}, {"phones": ["2025550101", "+44 20 2555 0102"]}),
        ({"phones": [{"x": "a"}, "412-4745"]}, {"phones": [{"x": "a"}, "555-0101"]}),
        ({"list": [{"phone": None}, "4155550123"]}, None),
        ({"card_number": 4111111111111111}, {"card_number": 4000000000000010}),
        ({"api_key": "a8f5f167f44f4964e6c998dee827110c"}, {"api_key": "1".rjust(32, "0")}),
        ({"phone_id": "4155550123", "call_at": 1755000074, "hotel": "12345678"}, None),
        ({"order": 4111111111111111, "token_id": 4111111111111111, "ok": True, "phone": None}, None),
    ],
)
def test_a_key_says_what_its_value_is(arguments: dict[str, Any], expected: dict[str, Any] | None) -> None:
    _, reference, _ = REDACTOR.redact([user("Do it.")], answer("", arguments))
    assert reference["tool_calls"][0]["arguments"] == (expected or arguments)
    as_text, _, _ = REDACTOR.redact([user(json.dumps(arguments))], answer())
    assert json.loads(as_text[0]["content"]) == (expected or arguments)


def test_what_an_argument_reveals_is_replaced_in_the_prompt() -> None:
    messages, reference, _ = REDACTOR.redact(
        [user("4124745 is mine, order 4124746")], answer("", {"phone": "412-4745"})
    )
    assert messages == [user("5550101 is mine, order 4124746")]
    assert reference == answer("", {"phone": "555-0101"})


# ── forms ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<Bob.Smith+x@mail.acme.co.uk>.", "<person1@example.com>."),
        ("mailto:bob@acme.com?to=bob%40acme.com", "mailto:person1@example.com?to=person1%40example.com"),
        ("-bob@acme.com, müller@firma.de", "-person1@example.com, person2@example.com"),
        ("sk-a1b2c3d4e5f6g7h8i9j0@acme.com", "person1@example.com"),
        ("bob@acme.com+eve@acme.com", "person1@example.com+person2@example.com"),
        ("邮箱是bob@example.cn谢谢", "邮箱是person1@example.com谢谢"),
    ],
)
def test_emails(text: str, expected: str) -> None:
    assert redact_text(text) == expected


NO_EMAILS = [
    "@bob",
    "me @ home",
    "pip install a@1.2.3",
    "git@github.com:acme/app",
    "logo@2x.png",
    "bob@localhost",
    "a@b@c",
    "person7@example.com",
]

PHONES = """
+1 415 555 0123|+1-415-555-0123|+14155550123|+1 (415) 555-0123|+1.415.555.0123|+1415-555-0123|(415) 555-0123
(415)555-0123|415-555-0123|415.555.0123|415 555 0123|(415) 555 0123|1-800-555-0199|1 (800) 555-0199|1-415-555-0123
415‑555‑0123|+44 20 7946 0958|+44 (0)20 7946 0958|+447700900123|+44-7700-900-123|0044 20 7946 0958|020 7946 0958
07700 900123|(020) 7946 0958|0161 496 0000|01632 960 001|+353 1 234 5678|087 123 4567|+49 30 901820|+49 171 1234567
0049 171 1234567|+49(0)30 901820|+49 (30) 901820|030/901820|0171 1234567|040/123456|+43 1 58800|0664 1234567
+41 44 668 18 00|044 668 18 00|+33 1 23 45 67 89|+33.1.23.45.67.89|01 23 45 67 89|01.23.45.67.89|+31 6 12345678
06-12345678|+46 8 123 456 78|08-123 456 78|070-123 45 67|+45 12 34 56 78|+47 912 34 567|+358 40 123 4567
+48 22 123 45 67|+420 601 123 456|+34 612 345 678|+351 912 345 678|+39 06 6982 1234|+30 21 0123 4567
+380 44 123 4567|+375 29 123-45-67|+7 495 123-45-67|8 (495) 123-45-67|+90 532 123 45 67|0532 123 45 67
+972-52-123-4567|+966 50 123 4567|+971 50 123 4567|+20 10 1234 5678|+27 82 123 4567|+234 803 123 4567
+254 712 345678|+91 98765 43210|+91-9876543210|+62 812-3456-7890|0812-3456-7890|+63 917 123 4567|+65 9123 4567
+84 90 123 45 67|+86 138 1234 5678|138-1234-5678|+886 912 345 678|+81 90-1234-5678|090-1234-5678|03-1234-5678
+82 10-1234-5678|010-1234-5678|+61 412 345 678|0412 345 678|(02) 9876 5432|+64 21 123 4567|021 123 4567
+55 11 91234-5678|(11) 91234-5678|+52 55 1234 5678|+54 9 11 1234-5678|+57 300 123 4567
""".replace("\n", "|").strip("|").split("|")  # fmt: skip

NAMED_PHONES = [
    ("phone: ", "4155550123"),
    ("my phone number is ", "07700900123"),
    ("Tel. ", "12345678"),
    ("mobile ", "91234567"),
    ("Fax no. ", "030901820"),
    ("WhatsApp: ", "612345678"),
    ("mi teléfono es ", "612 345 678"),
    ("call me at ", "4155550123"),
    ("call ", "412-4745"),
    ("ring us today on ", "637-6467"),
]

OTHERS = """
order 1234567890|#1234567890|order 4111111111111112|call order 1234567890|call 1234567890 failed|invoice 2024-000123
account 000123456789|0000012345|ticket 0012345678|part 12-3456-789|SKU 100-2000-300|114-1234567-1234567|12345-67890
1Z999AA10123456784|9400 1000 0000 0000 0000 00|ISBN 978-3-16-148410-0|EAN 4006381333931|IMEI 490154203237518
2024-01-15|2024-01-15T10:30:00Z|2024-01-15 10:30:00|01/02/2024|01.02.2024 10:15|1/2/2024 3/4/2024|20240115103000
20240115-103000|call me on 15-01-2024 10:30|call me at 2024-01-15 10|12:30-14:45|1990-2000|2023-24 2024-25 2025-26
2024-2025-2026|1755000074|1755000074.424|1755000074123|1755000074123456789|$1,299.00|1 299 000|8 000 000 000
EUR 12.500.000|$415 555 0123|1,234,567,890|0.50 0.75 1.25|3.14159265358979|0.4532015112830366|1234567890.12
4294967296|9223372036854775807|+15000000 revenue|+15000000000 revenue|x+12345678|5000000000 tokens
10 20 30 40 50 60 70|03 12 25 33 41 45|100 200 3000|sizes 256 512 1024|600x800 1024x768|2001 2002 2003 2004
4000 4100 4200 4300 4400 4500 4600 4700 4800|pages 1234-5678|90210-1234|94105 94107|123-45-6789|192.168.100.200
10.0.0.255:8080|2001:0db8:85a3:0000:0000:8a2e:0370:7334|version 2.31.4567890|v1.2.3-20240115
550e8400-e29b-41d4-a716-446655440000|12345678-1234-1234-1234-123456789012|d41d8cd98f00b204e9800998ecf8427e
e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855|lat 37.774929, lon -122.419416|-122.4194155
DE89 3704 0044 0532 0130 00|GB29 NWBK 6016 1331 9268 19|iPhone 15 128 256 512|hotel 12345678|mobile_user_id=12345678
next_page_token=abc123DEF456ghi789|max_tokens=1234567890123456|commit e3b0c44298fc1c149afbf4c8996fb92427ae41e4
sk-learn-pipeline-with-long-names|task-1234567890abcdefghij1234|private_key: ed25519.Ed25519PrivateKey
the secret is out there in 2024|api_key: your-api-key-goes-here|bearer of bad news from 2024
""".replace("\n", "|").strip("|").split("|")  # fmt: skip


def test_phones_on_the_labelled_list() -> None:
    """Usual forms of 45 countries. A span covers the last digits: country code and trunk prefix stay."""
    missed = []
    for number in PHONES:
        text = f"You can reach Bob at {number} after six."
        spans = REDACTOR.spans(text)
        if len(spans) != 1 or spans[0].kind != "phone" or not number.endswith(text[spans[0].start : spans[0].end]):
            missed.append(number)
    assert missed == ["+43 1 58800"]  # six digits are too few to be sure
    for before, number in NAMED_PHONES:
        (span,) = REDACTOR.spans(f"{before}{number}.")
        assert span.kind == "phone" and f"{before}{number}"[: span.end].endswith(number.lstrip("0"))
        assert before != "phone: " or not REDACTOR.spans(f"item {number}.")


@pytest.mark.parametrize("text", OTHERS + NO_EMAILS)
def test_what_is_left_alone(text: str) -> None:
    for whole in (text, f"It says {text} here.", f"({text})", f"{text}, ok"):
        assert REDACTOR.spans(whole) == []
    as_json = json.dumps({"value": text, "list": [text]})
    assert redact_text(as_json) == as_json


@pytest.mark.parametrize("number", PHONES)
def test_a_phone_keeps_its_form_in_every_form(number: str) -> None:
    digits = re.sub("[^0-9]", "", number)
    if number == "+43 1 58800":
        return
    text = f"From {number} to {digits}."
    new = redact_text(text)
    assert new != text and re.sub("[0-9]", "#", new) == re.sub("[0-9]", "#", text)
    dialled, bare = re.fullmatch("From (.*) to (.*).", new).groups()  # type: ignore[union-attr]
    assert re.sub("[^0-9]", "", dialled) == bare
    assert redact_text(new) == new


def test_numbers_side_by_side_are_two() -> None:
    assert redact_text("+1 415 555 0123 415-555-0199") == "+1 202 555 0101 202-555-0102"
    assert redact_text("+15000000 415-555-0123") == "+15000000 202-555-0101"
    assert redact_text("+15000000 (415) 555-0123") == "+15000000 (202) 555-0101"
    assert redact_text("01.02.2024 415-555-0123") == "01.02.2024 202-555-0101"


CARDS = [
    "4111 1111 1111 1111",
    "4111-1111-1111-1111",
    "4111111111111111",
    "5555 5555 5555 4444",
    "2223000048400011",
    "3782 822463 10005",
    "378282246310005",
    "3056 930902 5904",
    "3530111333300000",
    "6011000990139424",
    "6200000000000005",
    "6759649826438453",
]


@pytest.mark.parametrize("number", CARDS)
def test_cards_become_test_cards_of_their_issuer(number: str) -> None:
    new = redact_text(f"card {number}, 12/27, {re.sub('[^0-9]', '', number)}")
    shown, again = re.fullmatch("card (.*), 12/27, (.*)", new).groups()  # type: ignore[union-attr]
    digits = re.sub("[^0-9]", "", shown)
    assert again == digits and digits != re.sub("[^0-9]", "", number)
    assert luhn_holds(digits) and digits[0] in (number[0], "5") and digits[4:-2] == "0" * (len(digits) - 6)
    assert re.sub("[0-9]", "#", shown) == re.sub("[0-9]", "#", number)
    assert redact_text(new) == new


def test_what_stands_beside_a_card() -> None:
    assert redact_text("4111 1111 1111 1111 12/27 123") == "4000 0000 0000 0010 12/27 123"
    assert redact_text("4111 1111 1111 1111 123") == "4000 0000 0000 0010 123"
    assert redact_text("4111 1111 1111 1111 1225 123") == "4000 0000 0000 0010 1225 123"
    assert redact_text("5500 0000 0000 0004 4111 1111 1111 1111") == "5500 0000 0000 0012 4000 0000 0000 0028"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sk-proj-abcDEF123456ghiJKL789012", "sk-proj-000000000000000000000001"),
        ("sk-ant-api03-AbCd1234_EfGh5678-IjKl", "sk-ant-api03-00000000_00000000-0001"),
        ("AKIAIOSFODNNAEXAMPLE", "AKIA0000000000000001"),
        ("xoxb-123456789012-AbCdEf12345", "xoxb-000000000000-00000000001"),
        ("OPENAI_API_KEY=abc123DEF456ghi789", "OPENAI_API_KEY=000000000000000001"),
        (
            "client_secret: '550e8400-e29b-41d4-a716-446655440000'",
            "client_secret: '00000000-0000-0000-0000-000000000001'",
        ),
        ("Authorization: Bearer abcDEF123456ghiJKL", "Authorization: Bearer 000000000000000001"),
        (f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.{'dozjgN1y' * 5}", f"eyJhbGciOiJub25lIn0.e30.{1:040d}"),
        (
            f"-----BEGIN RSA PRIVATE KEY-----\n{'MIIEowIBAAKCAQEA' * 9}\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----\nKEY1\n-----END RSA PRIVATE KEY-----",
        ),
    ],
)
def test_keys(text: str, expected: str) -> None:
    assert redact_text(f"use {text} now") == f"use {expected} now"
    assert redact_text(expected) == expected
    assert json.loads(redact_text(json.dumps({"x": text}))) == {"x": expected}


def test_a_key_is_found_again_without_its_name() -> None:
    messages, reference, _ = REDACTOR.redact(
        [user("api_key=abc123DEF456ghi789")], answer("", {"x": "abc123DEF456ghi789"})
    )
    assert reference == answer("", {"x": "000000000000000001"})
    assert messages == [user("api_key=000000000000000001")]


def test_own_patterns() -> None:
    redactor = Redactor(
        Redaction(patterns={"account": r"^ACC-[0-9]+$", "customer_id": "customer (?P<value>[A-Z]{2}[0-9]+)"})
    )
    messages, reference, counts = redactor.redact(
        [user("I am customer AB123 (AB123, AB1234, XAB123), bob@acme.com")],
        answer("", {"id": "AB123", "callback_account": "ACC-1", "note": "ACC-1 is mine"}),
    )
    assert messages == [user("I am customer <CUSTOMER_ID_1> (<CUSTOMER_ID_1>, AB1234, XAB123), person1@example.com")]
    assert reference == answer(
        "", {"id": "<CUSTOMER_ID_1>", "callback_account": "<ACCOUNT_1>", "note": "<ACCOUNT_1> is mine"}
    )
    assert counts == {"customer_id": 3, "account": 2, "email": 1}
    assert redactor.redact(messages, reference) == (messages, reference, Counter())


def test_a_short_value_is_replaced_only_where_it_was_found() -> None:
    redactor = Redactor(Redaction(patterns={"room": "room (?P<value>[0-9]+)"}))
    assert redact_text("room 7 for 7 days, room 1234, 1234", redactor) == (
        "room <ROOM_1> for 7 days, room <ROOM_2>, <ROOM_2>"
    )


def test_an_engine_finds_what_the_patterns_have_left() -> None:
    def names(text: str) -> list[tuple[int, int, str]]:
        found = [(*match.span(), "PERSON") for match in re.finditer(r"[A-Z][a-z]+ [A-Z][a-z]+|\S+@\S+", text)]
        return [*found, *((start, end - 1, "PERSON") for start, end, _ in found)]

    redactor = Redactor(Redaction(presidio=Presidio()), names)
    messages, reference, counts = redactor.redact(
        [user("I am Jane Miller, jane@acme.com, not Eve Miller")], answer("", {"who": "miss Jane Miller"})
    )
    assert messages == [user("I am <PERSON_1>, person1@example.com, not <PERSON_2>")]
    assert reference == answer("", {"who": "miss <PERSON_1>"}) and counts == {"person": 3, "email": 1}
    assert redactor.redact(messages, reference) == (messages, reference, Counter())


def test_own_patterns_go_before_the_built_in_kinds() -> None:
    redactor = Redactor(Redaction(patterns={"staff": r"[a-z]+@acme\.com"}))
    assert redact_text("bob@acme.com, eve@other.com", redactor) == "<STAFF_1>, person1@example.com"
    redactor = Redactor(Redaction(patterns={"b": "[A-Z]+-[0-9]+", "a": "ACC-[0-9]+"}))
    assert redact_text("ACC-1 X-2", redactor) == "<A_1> <B_1>"


# ── properties ───────────────────────────────────────────────────────────────

digits = st.text("0123456789", min_size=1, max_size=12)
snippets = st.one_of(
    st.sampled_from(
        [*PHONES, *CARDS, *OTHERS, "bob@acme.com", "BOB@acme.com", "person1@example.com", "api_key=", "phone: "]
    ),
    st.sampled_from(
        [*" .,-+()@/\\\n\"'{}[]:<>_", "\\n", "ACC-", "<ACCOUNT_1>", "sk-", "00000000", "é", "\ud83d", "\x00"]
    ),
    digits,
    st.builds("415-555-{:0>4}".format, st.integers(0, 9999)),
    st.builds("u{}@acme.com".format, st.integers(0, 99)),
    st.text(max_size=4),
)
texts = st.builds(str.join, st.sampled_from(["", " ", ", ", "\n"]), st.lists(snippets, max_size=10))
apart = st.builds(str.join, st.sampled_from([" ", ", ", "\n", '" "']), st.lists(snippets, max_size=10))


def json_of(strings: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["phone", "card_number", "api_key", "x", "bob@acme.com"])
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=12,
    )


OWN = Redactor(Redaction(patterns={"account": "ACC-[0-9]+"}))


def shape(value: Any) -> Any:
    """Everything of a JSON value but the texts, and of numbers the type and the number of digits."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return (int, len(str(value))) if isinstance(value, int) and not isinstance(value, bool) else type(value)


@given(st.lists(texts, max_size=3), texts, json_of(texts))
@settings(max_examples=100, deadline=None)
def test_any_request_is_redacted_and_keeps_its_shape(contents: list[str], text: str, value: Any) -> None:
    arguments = {"v": value}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    messages = [*map(user, contents), {"role": "assistant", "content": None, "tool_calls": [call]}]
    before = json.dumps([messages, text, arguments])
    new, reference, counts = OWN.redact(messages, answer(text, arguments, text))
    assert json.dumps([messages, text, arguments]) == before, "the request itself was changed"
    assert [m["role"] for m in new] == [m["role"] for m in messages]
    kept = json.loads(new[-1]["tool_calls"][0]["function"]["arguments"])
    assert kept == reference["tool_calls"][0]["arguments"], "one value, in JSON text and as an object"
    assert shape(kept) == shape(arguments)
    assert bool(counts) == (new is not messages or reference["text"] != text or kept != arguments)


@given(st.lists(apart, max_size=3), json_of(apart))
@settings(max_examples=100, deadline=None)
def test_a_redacted_request_holds_nothing_more(contents: list[str], value: Any) -> None:
    messages, reference, _ = OWN.redact([*map(user, contents)], answer("", {"v": value}))
    again, same, counts = OWN.redact(messages, reference)
    assert (again, same, counts) == (messages, reference, Counter())


@given(
    st.integers(2_000_000_000, 9_999_999_999),
    st.sampled_from(["{}{}{}", "{}-{}-{}", "({}) {}-{}", "+1 {} {} {}", "+1{}{}{}"]),
)
def test_one_number_has_one_stand_in(number: int, form: str) -> None:
    area, exchange, line = str(number)[:3], f"2{str(number)[4:6]}", str(number)[6:]
    messages = [user(f"phone: {area}{exchange}{line}")]
    _, reference, _ = REDACTOR.redact(messages, answer("", {"to": form.format(area, exchange, line)}))
    assert reference == answer("", {"to": form.format("202", "555", "0101")})


# ── time ─────────────────────────────────────────────────────────────────────

HOSTILE = [
    "a", "@", "a@", "a.", "a@a.", "x@" + "a." * 99, "1", "1 ", "1-", "-1", "1   ", "+1", "+(", "(1",
    "1234567a", "1111 ", "2024-01-15 10:30:00 ", "phone ", "phone is ", "call me at ", "key=", "api_key: ",
    "bearer ", "sk-", "sk-a1", "eyJ", "eyJaaaaaaaaa.", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "0", "_",
    "<", "\\n1", "\\", '"', '{"a":', "[", '["',
]  # fmt: skip


def seconds(text: str) -> float:
    """The least of three runs of this thread alone: other tests' threads, or a collection of garbage, are not ours."""

    def run() -> float:
        start = time.thread_time()
        REDACTOR.redact([user(text)], answer())
        return time.thread_time() - start

    return min(run() for _ in range(3))


@pytest.mark.parametrize("part", HOSTILE)
def test_time_is_linear(part: str) -> None:
    """50 kB in a fraction of a second: at one nanosecond for each pair of characters it would be 2.5 s."""
    assert seconds((part * (50_000 // len(part) + 1))[:50_000]) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("part", HOSTILE)
def test_a_megabyte_takes_about_a_second(part: str) -> None:
    assert seconds((part * (1_000_000 // len(part) + 1))[:1_000_000]) < 3


def test_many_different_values_take_no_longer_than_they_must() -> None:
    text = " ".join(f"u{i}@acme.com api_key=aB{i:06d}cD{i:06d} 415-555-{i:04d}" for i in range(1500))
    assert seconds(text) < 2


def test_clean_text_costs_microseconds() -> None:
    text = (
        "You are the support assistant of the Acme shop. Prices are from $12 to $99.95, and we are open 24/7. " * 10
    )[:1000]
    assert min(seconds(text) for _ in range(20)) < 300e-6


# ── Presidio ─────────────────────────────────────────────────────────────────


def installed_model() -> str | None:
    """An English spaCy model where Presidio is installed too."""
    if not importlib.util.find_spec("presidio_analyzer"):
        return None
    import spacy

    return next((name for name in spacy.util.get_installed_models() if name.startswith("en_")), None)


def test_a_missing_engine_names_the_command_that_installs_it() -> None:
    with pytest.raises(ConfigError, match=r"presidio\.redactor"):
        Redactor(Redaction(presidio=Presidio()))
    installed = importlib.util.find_spec("presidio_analyzer") is not None
    command = "python -m spacy download no_such_model" if installed else r"pip install 'flywheel-ray\[presidio\]'"
    with pytest.raises(ConfigError, match=command):
        presidio.redactor(Redaction(presidio=Presidio(model="no_such_model")))
    assert redact_text("bob@acme.com", presidio.redactor(Redaction())) == "person1@example.com"


@pytest.mark.slow
@pytest.mark.skipif(
    installed_model() is None,
    reason="Presidio was not run: pip install 'flywheel-ray[presidio]' && python -m spacy download en_core_web_sm",
)
def test_presidio_finds_names() -> None:
    model = installed_model()
    assert model
    redactor = presidio.redactor(Redaction(presidio=Presidio(model=model, entities=("PERSON", "IBAN_CODE"))))
    messages, reference, counts = redactor.redact(
        [user("Hello, I am Jane Miller (jane@acme.com). My IBAN is DE89370400440532013000.")],
        answer("Thank you, Jane Miller!", {"name": "Jane Miller", "to": "jane@acme.com"}),
    )
    assert messages == [user("Hello, I am <PERSON_1> (person1@example.com). My IBAN is <IBAN_CODE_1>.")]
    assert reference == answer("Thank you, <PERSON_1>!", {"name": "<PERSON_1>", "to": "person1@example.com"})
    assert counts == {"person": 3, "email": 2, "iban_code": 1}
    assert redactor.redact(messages, reference) == (messages, reference, Counter())
    long = "\ud800 This was said by Jane Miller. " * 4000  # more than is given to spaCy at once
    found = list(presidio.finder(Presidio(model=model))(long))
    assert len(found) > 3000 and {long[s:e] for s, e, _ in found} == {"Jane Miller"}
    with pytest.raises(ConfigError, match="nothing finds UNICORN in language 'en'; known are"):
        presidio.redactor(Redaction(presidio=Presidio(model=model, entities=("UNICORN",))))
