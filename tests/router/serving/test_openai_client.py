"""The `openai` package against a real server: each call that it has for what is served, held to its own types."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import openai
from jsonschema import Draft202012Validator
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent

from router.engine.engine import Engine
from router.engine.request import Request


def beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


live, strict = beside("live"), beside("strict")
BASE = "builtin:tiny-lm"
TURNS = [{"role": "user", "content": "The parties agree"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WRONG, BAD = {"name": "a", "schema": {"not": {}}}, {"name": "a", "parameters": {"not": {}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.fixture(scope="module")
def address(published, routers):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=8)
    engine.host.tokenizer.chat_template = live.TEMPLATE
    with live.serving(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def raw(call, **fields):
    """The JSON of an answer, as it was sent."""
    return json.loads(call.with_raw_response.create(**fields).text)


def chat(client, **fields):
    told = {"model": "law", "messages": TURNS, "temperature": 0, "max_tokens": 8, **fields}
    return strict.read(ChatCompletion, raw(client.chat.completions, **told))


def chunks(client, **fields):
    told = {"model": "law", "messages": TURNS, "temperature": 0, "max_tokens": 8, **fields}
    with client.chat.completions.create(stream=True, **told) as stream:
        parts = list(stream)
    for part in parts:
        strict.check(part)
        assert isinstance(part, ChatCompletionChunk)
    return parts


def test_models(client):
    for model in client.models.list():
        assert isinstance(model, Model)
        strict.check(model)
    assert client.models.retrieve("local/law").id == "local/law"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("local/lwa")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize("model", ["law", "0.5 * law + code", "near", "arrow", "ensemble.mean(law, code)"])
def test_completions_and_their_streams(client, model):
    fields = {"model": model, "prompt": ["To be", "The"], "max_tokens": 6, "temperature": 0, "logprobs": 2, "n": 2}
    whole = strict.read(Completion, raw(client.completions, **fields))
    told = client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    texts, usage = [""] * 4, None
    for part in told:
        strict.check(part)
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage == whole.usage


def test_chat_and_its_streams(client):
    whole = chat(client, logprobs=True, top_logprobs=2)
    parts = chunks(client, logprobs=True, top_logprobs=2, stream_options={"include_usage": True})
    deltas = [choice.delta.content or "" for part in parts for choice in part.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    scored = [t for part in parts for c in part.choices if c.logprobs for t in c.logprobs.content]
    assert [t.token for t in scored] == [t.token for t in whole.choices[0].logprobs.content]
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_the_chosen_token_is_among_the_best_and_told_once(client):
    for seed in range(4):
        choice = chat(client, temperature=3.0, seed=seed, logprobs=True, top_logprobs=2).choices[0]
        for token in choice.logprobs.content:
            best = [(t.token, t.logprob) for t in token.top_logprobs]
            assert (token.token, token.logprob) in best
            assert len(set(best)) == len(best) in (2, 3)
    assert all(token.bytes == list(token.token.encode()) for token in choice.logprobs.content)


def test_tokens_that_are_half_a_character_show_their_bytes(client):
    """`é` forced by a grammar: whatever tokens write it, their bytes together are the text's."""
    fields = {"extra_body": {"structured_outputs": {"choice": ["漢字 né 😀"]}}, "max_tokens": 40}
    choice = chat(client, logprobs=True, top_logprobs=1, **fields).choices[0]
    assert choice.message.content == "漢字 né 😀"
    assert bytes(b for t in choice.logprobs.content for b in t.bytes).decode() == choice.message.content
    halves = [t for t in choice.logprobs.content if "\ufffd" in bytes(t.bytes).decode(errors="replace")]
    assert halves, "a small vocabulary has no token for 漢"
    for token in halves:
        assert token.token == "".join(f"\\x{byte:02x}" for byte in token.bytes)
    told = client.completions.create(
        model="law", prompt="To be", temperature=0, max_tokens=40, logprobs=1, extra_body=fields["extra_body"]
    )
    assert any(re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token) for token in told.choices[0].logprobs.tokens)


class Point(BaseModel):
    name: Literal["a", "b"]
    x: int = Field(ge=0, le=999)
    tags: list[Literal["red", "blue"]] = Field(max_length=3)


def test_answers_are_parsed_into_the_callers_types(client):
    for model in ("law", "ensemble.demix(law, code)", "arrow", "near"):
        told = client.chat.completions.parse(
            model=model, messages=TURNS, response_format=Point, temperature=1, seed=3, max_tokens=200
        )
        assert isinstance(told.choices[0].message.parsed, Point), model
    with client.chat.completions.stream(
        model="law", messages=TURNS, response_format=Point, temperature=1, seed=3, max_tokens=200
    ) as stream:
        for event in stream:
            assert event.type
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Point)


def test_an_answer_that_is_cut_is_not_parsed(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="law", messages=TURNS, response_format=Point, max_tokens=3)


def test_any_object(client):
    told = chat(client, response_format={"type": "json_object"}, max_tokens=300, temperature=1, seed=5)
    if told.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(told.choices[0].message.content), dict)
    assert told.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": WRONG}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex"),
        ({"extra_body": {"guided_json": "{"}}, "guided_json"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "guided_choice"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: x"}}}, "structured_outputs.grammar"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": BAD}], "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_400_by_its_field(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **fields)
    assert refused.value.param == param
    assert (refused.value.code == "context_length_exceeded") == (param == "messages")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_fits_its_schema(client, choice):
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 200, "temperature": 1, "seed": 4}
    told = chat(client, **fields, parallel_tool_calls=False).choices[0]
    assert (told.finish_reason, told.message.content) == ("tool_calls", None)
    (call,) = told.message.tool_calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    Draft202012Validator(schemas[call.function.name]).validate(json.loads(call.function.arguments))
    assert choice == "required" or call.function.name == "weather"
    parts = [c for part in chunks(client, **fields, parallel_tool_calls=False) for c in part.choices]
    deltas = [call for c in parts for call in c.delta.tool_calls or ()]
    assert [d.function.name for d in deltas if d.function.name] == [call.function.name]
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments
    assert deltas[0].id and deltas[0].type == "function" and not any(d.id for d in deltas[1:])
    assert parts[-1].finish_reason == "tool_calls"
    assert not any(c.delta.content for c in parts)


def test_tools_that_may_be_called_leave_free_text_as_it_is(client):
    told = chat(client, tools=TOOLS).choices[0]
    assert told.finish_reason == "length" and told.message.tool_calls is None
    assert "".join(c.delta.content or "" for p in chunks(client, tools=TOOLS) for c in p.choices) == (
        told.message.content
    )
    bound = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    assert chat(client, tools=bound).choices[0].message.content == told.message.content
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {**schema, "additionalProperties": False}},
    }
    either = chat(client, tools=TOOLS, response_format=form, max_tokens=100, temperature=1, seed=1).choices[0]
    assert either.message.tool_calls or isinstance(json.loads(either.message.content)["yes"], bool)


def test_turns_of_tools_go_through_the_template(client, address):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}
    turns = [
        *TURNS,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    told = chat(client, messages=turns, tools=TOOLS, tool_choice="none")
    listed = [dict(tool["function"]) for tool in TOOLS]
    for function in listed:
        function["parameters"] = function.pop("parameters")  # name, description, parameters
    listed[1] = {"name": "now", "description": "", "parameters": listed[1]["parameters"]}
    listed = json.dumps([{"type": "function", "function": function} for function in listed])
    text = (
        f"Tools: {listed}\nuser: The parties agree\nassistant: <tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>\ntool: rain\nassistant:'
    )
    plain = client.completions.create(model="law", prompt=text, temperature=0, max_tokens=8)
    assert told.choices[0].message.content == plain.choices[0].text
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        chat(client, messages=[*TURNS, {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{"}}]}])  # fmt: skip


def test_a_base_whose_template_knows_no_tools_refuses_them_by_name(published):
    engine = Engine(BASE, store=published.store, dtype="fp32")
    engine.host.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with live.serving(engine) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="x") as client:
        with pytest.raises(openai.BadRequestError, match="chat template knows no tools") as refused:
            chat(client, tools=TOOLS)
        assert refused.value.param == "tools"
        engine.host.tokenizer.chat_template += "{{ tools }}"
        with pytest.raises(openai.BadRequestError, match="--tool-format"):
            chat(client, tools=TOOLS)


def test_embeddings(client, published):
    texts = ["The parties agree", "To be", "def main("]
    told = strict.read(
        CreateEmbeddingResponse, raw(client.embeddings, model="law", input=texts, encoding_format="float")
    )
    vectors = np.array([one.embedding for one in told.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    packed = client.embeddings.create(model="law", input=texts)  # the package asks for base64
    assert np.array([one.embedding for one in packed.data]) == pytest.approx(vectors, abs=1e-6)
    sent = raw(client.embeddings, model="law", input=texts[0], encoding_format="base64")["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(sent), "<f4") == pytest.approx(vectors[0], abs=1e-6)
    short = client.embeddings.create(model="law", input=texts, dimensions=8)
    cut = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    assert np.array([one.embedding for one in short.data]) == pytest.approx(cut, abs=1e-5)
    ids = Engine(BASE, store=published.store, dtype="fp32").host.tokenizer(texts[1]).input_ids
    by_ids = client.embeddings.create(model="law", input=[ids, ids])
    assert by_ids.data[1].embedding == pytest.approx(vectors[1], abs=1e-5)
    assert by_ids.usage.prompt_tokens == 2 * len(ids)
    for model in ("0.5 * law + code", "near", "mood", BASE):
        assert len(client.embeddings.create(model=model, input="To be").data[0].embedding) == vectors.shape[1]
    for fields, param in (
        ({"dimensions": 10**6}, "dimensions"),
        ({"input": "a " * 600}, "input"),
        ({"input": []}, None),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(**{"model": "law", "input": "a", **fields})
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError, match="ensemble"):
        client.embeddings.create(model="ensemble.mean(law, code)", input="a")


def respond(client, **fields):
    told = {"model": "law", "input": "The parties agree", "temperature": 0, "max_output_tokens": 8, **fields}
    return strict.read(Response, raw(client.responses, **told))


def test_responses(client):
    told = respond(client, instructions="Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert told.output_text == chat(client, messages=turns).choices[0].message.content
    assert (told.status, told.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert told.usage.output_tokens == 8
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "The parties agree"}]}]
    assert respond(client, input=parts).output_text == respond(client).output_text
    scored = respond(client, include=["message.output_text.logprobs"], top_logprobs=2).output[0].content[0]
    assert "".join(t.token for t in scored.logprobs) == scored.text
    parsed = client.responses.parse(
        model="law", input="a point", text_format=Point, temperature=1, max_output_tokens=200
    )
    assert isinstance(parsed.output_parsed, Point)
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
        ({"input": "a " * 600}, "input"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            respond(client, **fields)
        assert refused.value.param == param


def test_responses_call_functions_and_are_told_what_these_said(client):
    tools = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]
    fields = {"tools": tools, "tool_choice": "required", "max_output_tokens": 100, "parallel_tool_calls": False}
    told = respond(client, **fields)
    (call,) = told.output
    Draft202012Validator(WEATHER).validate(json.loads(call.arguments))
    assert (call.type, call.name, told.status) == ("function_call", "weather", "completed")
    said = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    asked = [{"role": "user", "content": "?"}, call.model_dump(exclude_none=True), said]
    assert respond(client, input=asked, tools=tools, tool_choice="none").output_text


@pytest.mark.parametrize("tools", [False, True])
def test_responses_in_pieces_end_as_the_whole_one(client, tools):
    fields = {"tools": [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]}
    fields |= {"tool_choice": "required", "max_output_tokens": 100, "parallel_tool_calls": False}
    fields = fields if tools else {}
    told = respond(client, **fields)
    events = []
    with client.responses.with_streaming_response.create(
        **{"model": "law", "input": "The parties agree", "temperature": 0, "max_output_tokens": 8, **fields},
        stream=True,
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        events.append(strict.read(ResponseStreamEvent, json.loads(data.removeprefix("data: "))))
        assert name == f"event: {events[-1].type}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert (last.output_text, last.status, last.usage) == (told.output_text, told.status, told.usage)
    deltas = "".join(e.delta for e in events if e.type.endswith(".delta"))
    assert deltas == (last.output[0].arguments if tools else last.output_text)
    ends = {"text_format": Point, "max_output_tokens": 200, "temperature": 1}  # the package knows no other end
    with client.responses.stream(**{"model": "law", "input": "a", **(fields if tools else ends)}) as stream:
        final = stream.until_done().get_final_response()
    assert final.output[0].type == "function_call" if tools else isinstance(final.output_parsed, Point)


def test_async_clients_share_batches(address):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=60) as client:
            grammar = {"guided_regex": "[0-9]{5}"}

            async def one(i):
                told = await client.completions.create(
                    model="law", prompt="To be", temperature=1, seed=i, max_tokens=12,
                    extra_body=grammar if i % 2 else None,
                )  # fmt: skip
                return told.choices[0].text

            async def streamed():
                stream = await client.chat.completions.create(model="code", messages=TURNS, stream=True, max_tokens=6)
                return [part async for part in stream]

            return await asyncio.gather(*map(one, range(8)), streamed())

    *texts, parts = asyncio.run(ask())
    assert all(re.fullmatch("[0-9]{5}", text) for text in texts[1::2])
    assert len(set(texts)) > 4 and len(parts) > 3


def test_the_engine_says_the_same(client, engine):
    (wanted,) = engine.run([Request(text="To be", adapter="law", max_new_tokens=8)])
    told = client.completions.create(model="law", prompt="To be", temperature=0, max_tokens=8)
    assert told.choices[0].text == wanted.text
