"""Answers in gpt-oss's channels: what the reader sees, however the text is cut."""

from __future__ import annotations

import pytest

from slimrt.generation import _Text
from slimrt.text.channels import Channels

THOUGHT = "<|channel|>analysis<|message|>The user greets. <|e5|> <b>"
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
CASES = {
    "final": (THOUGHT + FINAL + "Hello <|en there", "Hello <|en there"),
    "only final": ("<|channel|>final<|message|>Hello", "Hello"),
    "cut within the thought": (THOUGHT, ""),
    "cut within a header": (THOUGHT + FINAL[:-6], ""),
    "cut where the end may begin": ("<|channel|>final<|message|>Hello<|e", "Hello<|e"),
    "preamble": ("<|channel|>commentary<|message|>Wait. " + FINAL + "Done", "Wait. Done"),
    "call": (CALL, CALL),
    "call behind a thought": (
        THOUGHT + "<|end|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>{}",
        "<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{}",
    ),
    "no channels": ("Hello <|channel|>analysis<|message|>", "Hello <|channel|>analysis<|message|>"),
    "nothing": ("", ""),
    "begins alike": ("<|chan", "<|chan"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_seen(name: str) -> None:
    text, expected = CASES[name]
    for size in (1, 2, 3, 7, 1000):
        channels, seen = Channels(), ""
        for at in range(0, len(text), size):
            seen += channels.push(text[at : at + size])
        assert seen + channels.finish() == expected, size


def test_stop_strings_count_in_what_is_seen() -> None:
    text = _Text(("greets", "lo"), Channels())
    seen = "".join(text.push(one) for one in THOUGHT + FINAL + "Hello there" if not text.stopped)
    assert text.stopped and seen == "Hel"
