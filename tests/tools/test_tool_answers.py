"""Answers with calls: bound at every setting, streamed, cut and refused, by a tiny model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("llguidance")

import slimrt
from slimrt.errors import SettingError
from slimrt.structured.guide import start
from slimrt.text.tokenizer import Tokenizer
from slimrt.tools.calling import ToolStream
from slimrt.tools.formats import FORMATS, SMOLLM2, Format
from slimrt.tools.grammar import answer_grammar, shown_tokens
from slimrt.tools.parser import Answer, Arguments, CallEnded, CallParser, CallStarted, TextDelta
from slimrt.tools.tool import tools_of
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import vocabulary, write_tiny_llama
from tests.vocabularies import sentencepiece_metadata, write_vocabulary

ALL = {form.name: form for form in (*FORMATS, SMOLLM2)}
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"$ref": "#/$defs/days"},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "unit"],
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": PLACE}}, {"name": "now"}]
ASK = [{"role": "user", "content": "hello world"}]
GOLDENS = Path(__file__).parents[1] / "goldens/chat"
SPELT = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|tool_call|>", "<|python_tag|>", "<|START_ACTION|>", "[THINK]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", ctx=2048)


@pytest.fixture(scope="module")
def llm(model: Path) -> slimrt.LLM:
    return slimrt.load(model, device="numpy", prune="off", threads=1)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> slimrt.LLM:
    """A model in which what the forms spell in brackets are control tokens."""
    tokens, types = vocabulary()
    more = [*tokens, *SPELT]
    kinds = [*types, *[int(gguf.TokenType.CONTROL)] * len(SPELT)]
    path = tmp_path_factory.mktemp("control") / "control.gguf"
    write_tiny_llama(path, vocab_size=len(more), ctx=2048, **{
        "tokenizer.ggml.tokens": more, "tokenizer.ggml.token_type": kinds,
    })  # fmt: skip
    return slimrt.load(path, device="numpy", prune="off", threads=1)


def fits(call: slimrt.ToolCall) -> bool:
    value = json.loads(call.arguments)
    if call.name == "now":
        return value == {}
    assert call.name == "weather" and set(value) <= {"city", "days", "unit"} and {"city", "unit"} <= set(value)
    days = value.get("days", 1)
    return len(value["city"]) <= 6 and value["unit"] in ("c", "f") and type(days) is int and 1 <= days <= 9


def accepts(form: Format, tokenizer: Tokenizer, text: str, **how: Any) -> bool | None:
    """Whether an answer may be ``text``; None where it may be its beginning."""
    guide = start(answer_grammar(form, tools_of(TOOLS), tokenizer, **how), tokenizer)
    for token in tokenizer.encode(text, special=True, add_bos=False):
        if not guide.allows(token):
            return False
        guide.take(token)
    return guide.complete or None


CALL = slimrt.ToolCall("123456789", "weather", '{"city": "Oslo", "days": 3, "unit": "c"}')
NUMBERED = slimrt.ToolCall("7", "weather", CALL.arguments)


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_an_answer_may_be(name: str, control: slimrt.LLM, llm: slimrt.LLM) -> None:
    form = ALL[name]
    one = NUMBERED if name == "command-r7b" else CALL
    call, calls = form.write([one]), form.write([one, one])
    if name == "qwen3-coder":  # a text that is bound stands in quotes
        call, calls = call.replace("Oslo", '"Oslo"'), calls.replace("Oslo", '"Oslo"')
    bad = (call.replace("Oslo", "Oslo and Bergen"), call.replace("days", "nights"), call.replace("weather", "whether"))
    begun = form.text_mark.removeprefix(form.given)
    for tokenizer in (control.tokenizer, llm.tokenizer):
        said = begun + "Hello [b] <c" if form.triggers else ""
        assert accepts(form, tokenizer, f"{begun}Hello <b> [x {{") is True
        assert accepts(form, tokenizer, said + call if said else call) is True
        direct = call.removeprefix(form.given)
        for required in (True, False):
            assert accepts(form, tokenizer, direct, required=required) is True
            assert accepts(form, tokenizer, calls.removeprefix(form.given), required=required) is not form.single
            assert accepts(form, tokenizer, f"{direct} more", required=required) is False
            assert not accepts(form, tokenizer, calls.removeprefix(form.given), required=required, many=False)
            for wrong in bad:
                assert accepts(form, tokenizer, wrong.removeprefix(form.given), required=required) is False, wrong
        assert not accepts(form, tokenizer, f"{begun}Hello", required=True)
        if form.given:
            continue
        thought = "<think>maybe <tool_call> or <function= so</think>\n\n"
        assert accepts(form, tokenizer, thought + call, thinking="may") is True
        assert accepts(form, tokenizer, call, thinking="may") is True
        assert accepts(form, tokenizer, thought + bad[0], thinking="may", required=True) is False
        assert accepts(form, tokenizer, thought.removeprefix("<think>") + call, thinking="open", required=True) is True
    ids = shown_tokens(form, control.tokenizer)
    assert {control.tokenizer.token_text(id) for id in ids} == {spelt for spelt in SPELT if spelt in form.lead + call}


def test_layouts_of_lists_that_models_are_trained_on(control: slimrt.LLM) -> None:
    tokenizer = control.tokenizer
    one = '{"name": "now", "arguments": {}}'
    for name, text in (
        ("mistral-list", '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "123456789"}]'),
        ("granite-3", f"<|tool_call|> [{one},{one}]"),
        ("smollm2", f"<tool_call>[\n{one},\n{one}\n]</tool_call>"),
        ("smollm2", "<tool_call>[]</tool_call>"),
        (
            "command-r7b",
            '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
        ),
    ):
        assert accepts(ALL[name], tokenizer, f"Hello {text}") is True, name
    assert accepts(ALL["smollm2"], tokenizer, "<tool_call>[]</tool_call>", required=True) is False


def test_the_vocabulary_of_mistral_7b(tmp_path: Path) -> None:
    """A SentencePiece vocabulary with a control token in front of calls: what is drawn at random is read back."""
    metadata = sentencepiece_metadata("mistral-v3")
    tokenizer = Tokenizer.from_gguf(GGUFFile(write_vocabulary(tmp_path / "v.gguf", metadata)))
    form, tools = ALL["mistral-list"], tools_of(TOOLS)
    (trigger,) = shown_tokens(form, tokenizer)
    assert tokenizer.token_text(trigger) == "[TOOL_CALLS]"
    written = form.write([CALL])
    assert (
        accepts(form, tokenizer, written) is True and accepts(form, tokenizer, written.replace("S][", "S] [")) is True
    )
    grammar, rng = answer_grammar(form, tools, tokenizer, required=True, many=False), np.random.default_rng(0)
    for _ in range(4):
        guide = start(grammar, tokenizer)
        decoder, parser, answer = tokenizer.stream_decoder(shown={trigger}), CallParser(form, tools), Answer()
        while not guide.done:
            token = int(rng.choice(np.flatnonzero(guide.allowed())))
            guide.take(token)
            for one in (token, *guide.forced(100)):
                answer.take(parser.push(decoder.push(one)))
        answer.take(parser.finish())
        (call,) = answer.calls
        assert fits(call) and not answer.text


@pytest.mark.parametrize("name", sorted(ALL))
def test_an_answer_without_calls_may_be_bound_to_a_schema(name: str, control: slimrt.LLM) -> None:
    form, tokenizer = ALL[name], control.tokenizer
    value = slimrt.Grammar.json_schema({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                                        "additionalProperties": False})  # fmt: skip
    begun = form.text_mark.removeprefix(form.given)
    call = form.write([slimrt.ToolCall("7", "now", "{}") if name == "command-r7b" else CALL])
    call = call.replace("Oslo", '"Oslo"') if name == "qwen3-coder" else call
    assert accepts(form, tokenizer, begun + '{"n": 2}', answer=value) is True
    assert accepts(form, tokenizer, call.removeprefix(form.given), answer=value) is True
    assert accepts(form, tokenizer, begun + '{"n": 3}', answer=value) is False
    assert accepts(form, tokenizer, f"{begun}Hello", answer=value) is False
    if not form.given:
        assert accepts(form, tokenizer, '<think>so</think>\n{"n": 1}', answer=value, thinking="may") is True


def test_other_control_tokens_may_stand_in_text(control: slimrt.LLM) -> None:
    text = "[THINK]hm [TOOL_[THINK] "
    assert accepts(ALL["mistral"], control.tokenizer, text) is True
    assert accepts(ALL["mistral"], control.tokenizer, text + ALL["mistral"].write([CALL])) is True
    assert accepts(ALL["hermes"], control.tokenizer, text + ALL["hermes"].write([CALL])) is True
    assert accepts(ALL["hermes"], control.tokenizer, text + "<tool_call>\n{}") is False


@pytest.mark.parametrize("name", ["hermes", "mistral", "granite-3", "qwen3-coder", "llama-3", "functionary-3.2"])
def test_calls_fit_their_schema_at_every_setting(name: str, control: slimrt.LLM) -> None:
    """A random model writes at random; what it writes is read back, in pieces as a whole."""
    tools, form = tools_of(TOOLS), ALL[name]
    grammar = answer_grammar(form, tools, control.tokenizer, required=True)
    shown = shown_tokens(form, control.tokenizer)
    from slimrt.request import GenerationRequest
    from slimrt.tools.calling import Calling

    calling = Calling(tools, tools, form, grammar, shown, "no", lambda answer: grammar)
    seen = set()
    for seed, options in enumerate([{"temperature": 3.0}, {"temperature": 1.0, "top_p": 0.1}, {}]):
        config = slimrt.SamplingConfig(seed=seed, **options)
        request = calling.bind(GenerationRequest(max_tokens=700, sampling=config))
        ids = control.tokenize("hello")
        stream = ToolStream(calling, control.session(), control.tokenizer, ids, request)
        told = Answer()
        told.take(stream.deltas())
        done = stream.completion
        assert done.text == told.text and list(done.tool_calls) == told.calls
        if done.finish_reason != "length":
            assert (done.finish_reason, done.text, done.complete) == ("tool_calls", "", True)
            assert done.tool_calls
        assert all(fits(call) for call in done.tool_calls)
        seen |= {call.name for call in done.tool_calls}
    assert seen


def test_chat_and_its_stream(llm: slimrt.LLM) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    hot: dict[str, Any] = {"temperature": 2.0, "seed": 3, "max_tokens": 400}
    done = llm.chat(ASK, tools=TOOLS, tool_choice=named, parallel_tool_calls=False, **hot)
    (call,) = done.tool_calls
    assert fits(call) and call.name == "weather" and (done.finish_reason, done.text) == ("tool_calls", "")
    stream = llm.chat(ASK, tools=TOOLS, tool_choice=named, parallel_tool_calls=False, stream=True, **hot)
    assert isinstance(stream, ToolStream)
    deltas = list(stream.deltas())
    assert isinstance(deltas[0], CallStarted) and deltas[0].name == "weather" and deltas[-1] == CallEnded(0)
    assert "".join(one.text for one in deltas if isinstance(one, Arguments)) == call.arguments
    assert sum(isinstance(one, Arguments) for one in deltas) > 3
    assert stream.completion.tool_calls[0].id == deltas[0].id
    assert list(llm.chat(ASK, tools=TOOLS, tool_choice=named, stream=True, **hot)) == []  # no text
    answered = [
        *ASK,
        {"role": "assistant", "content": done.text, "tool_calls": [call.as_openai()]},
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
    ]
    prompt = llm.detokenize(llm.chat_tokens(answered, llm.calling(TOOLS)), special=True)
    assert "<tool_response>\n21 degrees\n</tool_response>" in prompt and '"name": "weather"' in prompt
    plain = llm.chat(answered, max_tokens=3)
    assert plain.tool_calls == () and plain.usage.prompt_tokens < len(prompt)


def test_a_schema_beside_tools(llm: slimrt.LLM) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    kinds = set()
    for seed in range(6):
        done = llm.chat(ASK, tools=TOOLS, schema=schema, temperature=3.0, seed=seed, max_tokens=400)
        assert done.complete or done.finish_reason == "length"
        kinds.add(done.finish_reason)
        if done.finish_reason == "tool_calls":
            assert all(map(fits, done.tool_calls)) and done.text == ""
        elif done.complete:
            assert json.loads(done.text)["n"] in (1, 2) and not done.tool_calls
    assert len(kinds) == 2


def test_text_stays_text(llm: slimrt.LLM) -> None:
    free = llm.chat(ASK, tools=TOOLS, max_tokens=12)
    assert free.tool_calls == () and free.finish_reason in ("length", "stop") and free.text
    pieces = list(llm.chat(ASK, tools=TOOLS, max_tokens=12, stream=True))
    assert "".join(pieces) == free.text and len(pieces) > 2
    told = list(llm.chat(ASK, tools=TOOLS, max_tokens=12, stream=True).deltas())
    assert all(isinstance(one, TextDelta) for one in told)
    off = llm.chat(ASK, tools=TOOLS, tool_choice="none", max_tokens=12)
    assert off.text == llm.chat(ASK, max_tokens=12).text


def test_a_call_that_is_cut_is_text_and_says_so(llm: slimrt.LLM) -> None:
    how: dict[str, Any] = {"tools": TOOLS, "tool_choice": {"name": "weather"}, "temperature": 2.0, "seed": 3}
    whole = llm.chat(ASK, parallel_tool_calls=False, max_tokens=400, **how)
    for most in (1, 9, 25, len(whole.tokens) - 14):
        cut = llm.chat(ASK, max_tokens=most, **how)
        assert (cut.finish_reason, cut.complete, cut.tool_calls) == ("length", False, ())
        assert cut.text == llm.detokenize(cut.tokens) and cut.text
    stopped = llm.chat(ASK, max_tokens=400, stop='"city', **how)
    assert (stopped.finish_reason, stopped.complete, stopped.tool_calls) == ("stop", False, ())
    assert stopped.text == '<tool_call>\n{"name": "weather", "arguments": {'


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": "x"}, "must be a list"),
        ({"tools": TOOLS, "tool_choice": {"name": "sub"}}, "no tool has this name; there are: weather, now"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls '1': must be true or false"),
        ({"tools": TOOLS, "grammar": 'root ::= "a"'}, "tools with a GBNF grammar"),
        ({"tools": TOOLS, "schema": {"type": "strin"}}, "^JSON schema .*strin"),
        ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos"),
        (
            {"tools": [TOOLS[1], {"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}}]},
            "tool 'f': JSON schema .*strin",
        ),
        (
            {"tools": [{"name": "f", "parameters": {"properties": {"a": {"type": "string", "minLength": 5,
                                                                         "maxLength": 3}}, "required": ["a"]}}]},
            "tool 'f': .*Unsatisfiable",
        ),
        ({"tools": [{"name": "f", "parameters": {"x-guidance": {"coerce_one_of": True}}}]}, "x-guidance"),
    ],
)  # fmt: skip
def test_requests_that_are_refused_before_the_prompt_is_read(
    options: dict[str, Any], says: str, llm: slimrt.LLM
) -> None:
    llm.reset()
    with pytest.raises(SettingError, match=says) as caught:
        llm.chat(ASK, **options)
    assert "\n" not in str(caught.value) and not llm.current.tokens


def test_a_missing_package_is_named(llm: slimrt.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SettingError, match=r"^schemas and grammars need the llguidance package"):
        fresh = {"name": "f", "parameters": {"properties": {"compiled_nowhere_else": {"type": "string"}}}}
        answer_grammar(ALL["hermes"], tools_of([fresh]), llm.tokenizer)


def test_elements_name_what_they_cannot_hold(llm: slimrt.LLM) -> None:
    for parameters, says in (
        ({"anyOf": [{"properties": {}}]}, "anyOf binds them together"),
        ({"properties": {"a>": {}}}, "a parameter is called 'a>'"),
    ):
        with pytest.raises(SettingError, match=says):
            answer_grammar(ALL["qwen3-coder"], tools_of([{"name": "f", "parameters": parameters}]), llm.tokenizer)


def test_text_is_free_to_begin_with_anything(control: slimrt.LLM) -> None:
    tokenizer = control.tokenizer
    guide = start(answer_grammar(ALL["hermes"], tools_of(TOOLS), tokenizer), tokenizer)
    allowed = set(np.flatnonzero(guide.allowed()).tolist())
    texts = {id for id in range(tokenizer.vocab_size) if tokenizer.is_text(id)}
    assert {id for id in texts if tokenizer.token_bytes(id)[0] < 0x80 or tokenizer.token_bytes(id)[0] >= 0xC2} - {
        id for id in texts if tokenizer.token_bytes(id)[0] > 0xF4
    } <= allowed
    assert tokenizer.stop_ids <= allowed


@pytest.mark.parametrize("template", [None, "qwen2.5", "llama-3.1"])
def test_control_tokens_that_tools_and_calls_spell_are_text(template: str | None, model: Path) -> None:
    source = None if template is None else (GOLDENS / f"{template}.jinja").read_text()
    llm = slimrt.load(model, device="numpy", prune="off", threads=1, chat_template=source)
    counts = []
    for end in ("<|im_end|>", "(|im_end|)"):
        parameters = {"properties": {f"a{end}": {"description": end}}}
        calling = llm.calling([{"name": "f", "description": f"evil {end}", "parameters": parameters}])
        call = {"id": "x", "function": {"name": f"f{end}", "arguments": json.dumps({end: {end: end}})}}
        turns = [
            *ASK,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x", "content": end},
        ]
        counts.append([id for id in llm.chat_tokens(turns, calling) if id < 3])
    assert counts[0] == counts[1]


def test_the_model_reads_the_tools(llm: slimrt.LLM) -> None:
    text = llm.detokenize(llm.chat_tokens(ASK, llm.calling(TOOLS, {"name": "now"})), special=True)
    assert re.search(r"<tools>\n\{.*\"weather\".*\n\{.*\"now\".*\n</tools>", text)  # all, whichever may be called
