"""Stock clients against a real `hub serve`: which of a client's features work, as a table.

    python tests/benchmarks/clients.py [--base DIR] [--only openai,litellm,langchain,lm-eval] [--json FILE]

Needs `pip install moduloom[dev,bench]`; a client that is not installed has an empty column.
Each cell is a call that is checked: "yes", "-" where the client has no such call, or what went wrong. lm-eval's
figures are compared with those that it finds with transformers on the same base.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parent / "router" / "serving"
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
TURNS = [{"role": "user", "content": "Where is it warm?"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 1},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": CITY}}
Checks = dict[str, Callable[[], None]]


def beside(name: str) -> Any:
    """A module of the tests of the server."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def server(base: str, place: Path) -> Iterator[str]:
    """The address of a server in a process of its own, with one adapter called `mine`."""
    import torch

    import compose

    model = compose.load(base, dtype="fp32")
    adapter = compose.create(model, "lora", {"r": 4, "target_modules": "all-linear"}, name="mine", seed=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    compose.save(adapter.freeze(), place / "mine", model=model, task="causal_lm")
    template = place / "template.jinja"
    template.write_text(beside("live").TEMPLATE)
    command = [sys.executable, "-m", "hub", "serve", base, "--port", "0", "--dtype", "fp32"]
    command += ["--adapter", f"mine={place / 'mine'}", "--chat-template", str(template)]
    environment = {**os.environ, "HUB_HOME": str(place / "hub")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http" in line, line
        try:
            yield "http" + line.partition("http")[2].split()[0].rstrip("/")
        finally:
            process.terminate()


def fits(arguments: str | dict[str, Any]) -> None:
    """AssertionError for arguments that are not those of the tool."""
    from jsonschema import Draft202012Validator

    Draft202012Validator(CITY).validate(json.loads(arguments) if isinstance(arguments, str) else arguments)


def of_openai(address: str, _base: str, _place: Path) -> Checks:
    """The `openai` package; its answers are held to its own types."""
    from typing import Literal

    import openai
    from pydantic import create_model

    strict = beside("strict")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    city = create_model("city", city=(Literal["Rome", "Oslo"], ...))
    chat: dict[str, Any] = {"model": "mine", "messages": TURNS, "max_tokens": 60, "temperature": 0}
    text: dict[str, Any] = {"model": "mine", "prompt": "It is warm in", "max_tokens": 8, "temperature": 0}
    tools: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}

    def streamed(parts: Any) -> list[Any]:
        found = list(parts)
        for part in found:
            strict.check(part)
        assert len(found) > 2
        return found

    def scores() -> None:
        told = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
        strict.check(told)
        assert told.choices[0].logprobs.content

    def echo() -> None:
        told = client.completions.create(**{**text, "max_tokens": 0}, echo=True, logprobs=1)
        assert len(told.choices[0].logprobs.tokens) > 3

    def called() -> None:
        told = client.chat.completions.create(**chat, **tools)
        strict.check(told)
        fits(told.choices[0].message.tool_calls[0].function.arguments)
        assert told.choices[0].finish_reason == "tool_calls"

    def called_in_pieces() -> None:
        parts = streamed(client.chat.completions.create(**chat, **tools, stream=True))
        fits("".join(c.function.arguments for p in parts for c in p.choices[0].delta.tool_calls or ()))

    def parsed() -> None:
        told = client.chat.completions.parse(**chat, response_format=city)
        assert told.choices[0].message.parsed is not None

    def next_turn() -> None:
        told = client.chat.completions.create(**chat, **tools).choices[0].message
        said = {"role": "tool", "tool_call_id": told.tool_calls[0].id, "content": "warm"}
        turns = [*TURNS, told.model_dump(exclude_none=True), said]
        strict.check(client.chat.completions.create(**{**chat, "messages": turns}, tools=[TOOL], tool_choice="none"))

    def vectors() -> None:
        told = client.embeddings.create(model="mine", input=["a", "b"], dimensions=8)
        strict.check(told)
        assert len(told.data[1].embedding) == 8

    def refused() -> None:
        try:
            client.chat.completions.create(**{**chat, "model": "none/such"})
        except openai.NotFoundError as error:
            assert error.code == "model_not_found"
        else:
            raise AssertionError("a model that is not there answers")

    def responded() -> None:
        told = client.responses.create(model="mine", input="Where?", max_output_tokens=8)
        strict.check(told)
        assert told.output_text
        assert client.responses.parse(model="mine", input="Where?", text_format=city).output_parsed is not None

    return {
        "models": lambda: [strict.check(one) for one in client.models.list()] and None,
        "completion": lambda: strict.check(client.completions.create(**text)),
        "completion, stream": lambda: streamed(client.completions.create(**text, stream=True)) and None,
        "chat": lambda: strict.check(client.chat.completions.create(**chat)),
        "chat, stream": lambda: streamed(client.chat.completions.create(**chat, stream=True)) and None,
        "scores": scores,
        "echo with scores": echo,
        "tools": called,
        "tools, stream": called_in_pieces,
        "tools, next turn": next_turn,
        "JSON schema": parsed,
        "embeddings": vectors,
        "responses": responded,
        "responses, stream": lambda: streamed(client.responses.create(model="mine", input="?", stream=True)) and None,
        "errors by type": refused,
    }


def of_openai_async(address: str, _base: str, _place: Path) -> Checks:
    """Its client for event loops."""
    import openai

    strict = beside("strict")
    chat: dict[str, Any] = {"model": "mine", "messages": TURNS, "max_tokens": 12, "temperature": 0}

    def once(ask: Callable[[openai.AsyncOpenAI], Any]) -> Callable[[], None]:
        async def run() -> None:
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                told = await ask(client)
                if hasattr(told, "__aiter__"):
                    parts = [part async for part in told]
                    assert len(parts) > 2
                    told = parts[0]
                strict.check(told)

        return lambda: asyncio.run(run())

    text = {"model": "mine", "prompt": "It is", "max_tokens": 8}
    return {
        "completion": once(lambda c: c.completions.create(**text)),
        "completion, stream": once(lambda c: c.completions.create(**text, stream=True)),
        "chat": once(lambda c: c.chat.completions.create(**chat)),
        "chat, stream": once(lambda c: c.chat.completions.create(**chat, stream=True)),
        "embeddings": once(lambda c: c.embeddings.create(model="mine", input="a")),
        "responses": once(lambda c: c.responses.create(model="mine", input="a", max_output_tokens=8)),
        "responses, stream": once(lambda c: c.responses.create(model="mine", input="a", stream=True)),
    }


def of_litellm(address: str, _base: str, _place: Path) -> Checks:
    """litellm, as a client of an OpenAI-like server."""
    import litellm

    litellm.suppress_debug_info = True
    place: dict[str, Any] = {"api_base": f"{address}/v1", "api_key": "none"}
    chat: dict[str, Any] = {"model": "openai/mine", "messages": TURNS, "max_tokens": 60, "temperature": 0, **place}
    text: dict[str, Any] = {"model": "text-completion-openai/mine", "prompt": "It is", "max_tokens": 8, **place}
    tools: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required"}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}

    def said(answer: Any) -> Any:
        return answer.choices[0].message

    def pieces() -> None:
        parts = list(litellm.completion(**chat, stream=True))
        assert (
            "".join(part.choices[0].delta.content or "" for part in parts) == said(litellm.completion(**chat)).content
        )

    def called_in_pieces() -> None:
        parts = list(litellm.completion(**chat, **tools, stream=True, parallel_tool_calls=False))
        fits("".join(c.function.arguments for p in parts for c in p.choices[0].delta.tool_calls or ()))

    def scores() -> None:
        assert litellm.completion(**chat, logprobs=True, top_logprobs=1).choices[0].logprobs.content

    def refused() -> None:
        try:
            litellm.completion(**{**chat, "model": "openai/none/such"})
        except litellm.NotFoundError:
            return
        raise AssertionError("a model that is not there answers")

    def vectors() -> None:
        told = litellm.embedding(model="openai/mine", input=["a", "b"], encoding_format="float", **place)
        assert len(told.data) == 2

    return {
        "completion": lambda: _true(litellm.text_completion(**text).choices[0].text),
        "completion, stream": lambda: _true(len(list(litellm.text_completion(**text, stream=True))) > 2),
        "chat": lambda: _true(said(litellm.completion(**chat)).content),
        "chat, stream": pieces,
        "scores": scores,
        "tools": lambda: fits(said(litellm.completion(**chat, **tools)).tool_calls[0].function.arguments),
        "tools, stream": called_in_pieces,
        "JSON schema": lambda: fits(said(litellm.completion(**chat, response_format=form)).content),
        "embeddings": vectors,
        "responses": lambda: _true(litellm.responses(model="openai/mine", input="Where?", **place).output),
        "errors by type": refused,
    }


def of_langchain(address: str, _base: str, _place: Path) -> Checks:
    """langchain-openai."""
    from langchain_core.messages import ToolMessage
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    place: dict[str, Any] = {"base_url": f"{address}/v1", "api_key": "none", "model": "mine"}
    chat = ChatOpenAI(**place, max_tokens=60, temperature=0)
    text = OpenAI(**place, max_tokens=8, temperature=0)
    armed = chat.bind_tools([TOOL], tool_choice="required")
    structured = [
        chat.with_structured_output({**CITY, "title": "city"}, method=m) for m in ("json_schema", "function_calling")
    ]

    def pieces() -> None:
        assert "".join(part.content for part in chat.stream("Where?")) == chat.invoke("Where?").content

    def next_turn() -> None:
        call = armed.invoke("Where?")
        result = ToolMessage("warm", tool_call_id=call.tool_calls[0]["id"])
        assert chat.bind_tools([TOOL], tool_choice="none").invoke([("user", "Where?"), call, result]).content

    def called_in_pieces() -> None:
        whole = None
        for part in armed.stream("Where?"):
            whole = part if whole is None else whole + part
        fits(whole.tool_calls[0]["args"])

    embed = OpenAIEmbeddings(**place, check_embedding_ctx_length=False)
    respond = ChatOpenAI(**place, max_tokens=8, use_responses_api=True)
    return {
        "completion": lambda: _true(text.invoke("It is")),
        "completion, stream": lambda: _true(len(list(text.stream("It is"))) > 2),
        "chat": lambda: _true(asyncio.run(chat.ainvoke("Where?")).content),
        "chat, stream": pieces,
        "scores": lambda: _true(chat.bind(logprobs=True).invoke("Where?").response_metadata["logprobs"]),
        "tools": lambda: fits(armed.invoke("Where?").tool_calls[0]["args"]),
        "tools, stream": called_in_pieces,
        "tools, next turn": next_turn,
        "JSON schema": lambda: [fits(one.invoke("Where?")) for one in structured] and None,
        "embeddings": lambda: _true(len(embed.embed_documents(["a", "b"])) == 2),
        "responses": lambda: _true(respond.invoke("Where?").content),
        "responses, stream": lambda: _true(len(list(respond.stream("Where?"))) > 2),
    }


def of_lm_eval(address: str, base: str, place: Path) -> Checks:
    """lm-eval's `local-completions` on a task from a file, against its own `hf` on the same base."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from compose.base.location import locate

    directory = str(locate(base).directory)
    rows = [
        {"text": "The parties agree that the", "choices": [" law", " contract shall"], "label": 1},
        {"text": "import os\ndef main(", "choices": ["argv):", " the king"], "label": 0},
        {"text": "To be, or not to", "choices": [" be", " agreement"], "label": 0},
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    tasks = {
        "ours_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
                        "metric_list": [{"metric": "acc"}]},
        "ours_words": {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}",
                       "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
        "ours_writing": {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
                         "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
                         "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip
    for name, told in tasks.items():
        (place / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **told}))  # JSON is YAML
    manager = TaskManager(include_path=str(place))

    def results(model: str, arguments: str, task: str) -> dict[str, Any]:
        told = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        assert told is not None
        return {"figures": told["results"][task], "said": [s["resps"] for s in told["samples"][task]]}

    def same(task: str) -> None:
        ours = results(
            "local-completions",
            f"model={base},base_url={address}/v1/completions,tokenizer={directory},num_concurrent=2,max_length=512",
            task,
        )
        theirs = results("hf", f"pretrained={directory},dtype=float32,device=cpu", task)
        for name, value in theirs["figures"].items():
            if isinstance(value, float):
                assert abs(ours["figures"][name] - value) <= 1e-3 * max(1.0, abs(value)), (name, ours, theirs)
        if task == "ours_writing":
            assert ours["said"] == theirs["said"], (ours["said"], theirs["said"])

    return {
        "completion": lambda: same("ours_writing"),
        "echo with scores": lambda: [same(task) for task in ("ours_choice", "ours_words")] and None,
    }


def _true(value: Any) -> None:
    assert value


CLIENTS = {
    "openai": of_openai,
    "openai async": of_openai_async,
    "litellm": of_litellm,
    "langchain": of_langchain,
    "lm-eval": of_lm_eval,
}


def cell(check: Callable[[], None]) -> str:
    """What became of a check."""
    try:
        check()
    except Exception as error:  # whatever a client raises stands in the table
        traceback.print_exc()
        return f"no: {type(error).__name__}"
    return "yes"


def main() -> int:
    """Print the table; 1 where something does not work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="builtin:tiny-lm")
    parser.add_argument("--only", default=",".join(CLIENTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place, server(options.base, Path(place)) as address:
        for name in options.only.split(","):
            try:
                checks = CLIENTS[name](address, options.base, Path(place))
            except ImportError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            found[name] = {feature: cell(check) for feature, check in checks.items()}
    features = list(dict.fromkeys(feature for column in found.values() for feature in column))
    lines = [["", *found], ["---"] * (len(found) + 1)]
    lines += [[feature, *(column.get(feature, "-") for column in found.values())] for feature in features]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return int(any(told.startswith("no") for column in found.values() for told in column.values()))


if __name__ == "__main__":
    sys.exit(main())
