"""The dictionary of loaded adapters: a request finds what its name stands for when it begins, and keeps that."""

import asyncio
from dataclasses import dataclass

from router.upstream.served import Served


@dataclass
class Loaded:
    lora_name: str


def test_names_move_between_requests_and_never_within_one():
    stands_for = {"tone@prod": "tone@1"}
    served = Served({"static": Loaded("static")}, stands_for.get)

    async def request(name, *, loads=None, wait=None):
        found = name in served
        if not found and loads is not None:
            served[name] = Loaded(loads)  # as the engine does after it has asked the resolver
        if wait is not None:
            await wait.wait()
        assert (name in served) is (found or loads is not None)
        return served[name].lora_name if name in served else None

    async def story():
        assert await asyncio.create_task(request("static")) == "static"
        assert await asyncio.create_task(request("tone@prod")) is None
        assert await asyncio.create_task(request("tone@prod", loads="tone@1")) == "tone@1"
        assert await asyncio.create_task(request("tone@prod")) == "tone@1"
        gate = asyncio.Event()
        old = [asyncio.create_task(request("tone@prod", wait=gate)) for _ in range(3)]
        await asyncio.sleep(0)
        stands_for["tone@prod"] = "tone@2"
        assert await asyncio.create_task(request("tone@prod")) is None, "not loaded yet, so the resolver is asked"
        late = asyncio.create_task(request("tone@prod", loads="tone@2", wait=gate))
        await asyncio.sleep(0)
        stands_for["tone@prod"] = "tone@3"
        gate.set()
        assert await asyncio.gather(*old) == ["tone@1"] * 3
        assert await late == "tone@2", "what was found is kept though the name has moved since"
        stands_for["tone@prod"] = "tone@1"
        assert await asyncio.create_task(request("tone@prod")) == "tone@1", "and back, without loading"
        assert await asyncio.create_task(request("tone@2")) == "tone@2", "listed names are names"

    asyncio.run(story())
    assert sorted(served) == sorted(one.lora_name for one in served.values()) == ["static", "tone@1", "tone@2"]


def test_one_adapter_is_kept_once_and_can_be_unloaded():
    served = Served({}, {"a": "x#1", "b": "x#1"}.get)

    async def load(name):
        served[name] = Loaded("x#1")
        return served[name]

    async def story():
        first = await asyncio.create_task(load("a"))
        assert await asyncio.create_task(load("b")) is first
        del served["a"]
        assert "a" not in served and "b" not in served and served.get("a", 7) == 7

    asyncio.run(story())
    assert not list(served)
