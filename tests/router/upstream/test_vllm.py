"""Inside a real vLLM: names, exact expressions with our engine's tokens, refusals in its form, names that move.

MODULOOM_VLLM_PYTHON is the Python of an environment with vLLM; MODULOOM_VLLM_BASE a model directory, where the built-in
base is not what is wanted.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from pathlib import Path

import pytest
import torch

import compose
import hub
from hub.store import Store
from router import Engine, Request

PYTHON = os.environ.get("MODULOOM_VLLM_PYTHON")
BASE = os.environ.get("MODULOOM_VLLM_BASE") or str(Path(compose.__file__).parent / "base" / "builtin" / "tiny_lm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MODULOOM_VLLM_PYTHON names no Python with vLLM"),
]
SUBJECTS = ("The law of", "A river", "My old friend", "Every morning the", "In the year")
PROMPTS = [f"{subject} {rest}" for subject in SUBJECTS for rest in ("the land", "is", "said that", "was made of")]
TOKENS, RANK = 24, 16
EXACT = (
    "ns/a",
    "ns/a@prod",
    "ns/b>=1,<2",
    "0.5 * ns/a - 0.25 * ns/b",
    "average(ns/a, ns/b)",
    "svd(ns/a, ns/b, rank=4)",
    "ties(ns/a, ns/b, rank=8)",
    "ns/both",
)


def server_module():
    spec = importlib.util.spec_from_file_location("vllm_server", Path(__file__).with_name("vllm_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def publish(home: Path, folder: Path, name: str, kind: str, options, *, seed: int, version="1.0.0", base=BASE):
    """An adapter far from the identity, drawn from a seed."""
    model = compose.load(base, dtype="fp32")
    adapter = compose.create(model, kind, options, name="it", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        size = parameter.data.abs().mean().clamp(min=0.02)
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    place = folder / f"{name}-{version}"
    compose.save(adapter.freeze(), place, model=model, task="causal_lm")
    hub.push(place, name=f"ns/{name}", version=version, base=base, license="apache-2.0", trial=False, store=Store(home))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with adapters of several kinds; two versions of `ns/a`, of which `prod` is the first."""
    root = tmp_path_factory.mktemp("vllm")
    home, all_linear = root / "home", {"target_modules": "all-linear"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUB_HOME", str(home))
        publish(home, root, "a", "lora", {"r": 4, **all_linear}, seed=1)
        publish(home, root, "b", "lora", {"r": 8, **all_linear}, seed=2)
        publish(home, root, "big", "lora", {"r": 24, **all_linear}, seed=3)
        publish(home, root, "d", "dora", {"r": 2, "target_modules": ["q_proj"]}, seed=4)
        publish(home, root, "i", "ia3", None, seed=5)
        publish(home, root, "p", "prefix", None, seed=6)
        Store().tag("ns/a@1.0.0", "prod")
        compose.publish("0.5 * ns/a + ns/b", "ns/both@1.0.0")
        other = compose.load(BASE, dtype="fp32")
        with torch.no_grad():
            other.get_input_embeddings().weight.mul_(1.5)
        other.save_pretrained(root / "other")
        publish(home, root, "foreign", "lora", {"r": 4}, seed=7, base=str(root / "other"))
    return home


@pytest.fixture(scope="module")
def server(home, tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    with server_module().vllm(PYTHON, BASE, home, place, "--max-lora-rank", str(RANK)) as running:
        yield running


@pytest.fixture
def engine(home, monkeypatch):
    monkeypatch.setenv("HUB_HOME", str(home))
    return Engine(BASE, dtype="fp32", rows=20)


@pytest.fixture(scope="module")
def prompts():
    """Token ids, so that both engines read the same."""
    tokenizer = compose.tokenizer(BASE)
    return [tokenizer(text).input_ids for text in PROMPTS]


def ours(engine: Engine, prompts, expression: str | None) -> list[str]:
    """What our engine writes, prompt by prompt."""
    rows = [Request(ids=tuple(ids), adapter=expression, max_new_tokens=TOKENS) for ids in prompts]
    return [result.text for result in engine.run(rows)]


def as_text(theirs) -> list[str]:
    """Texts of tokens, read by our tokenizer up to the end token."""
    tokenizer = compose.tokenizer(BASE)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in theirs]


@pytest.mark.parametrize("expression", EXACT)
def test_exact_expressions_say_what_ours_say(server, engine, prompts, expression):
    theirs = server.ids(expression, prompts, TOKENS)
    mine = ours(engine, prompts, f'"{expression}"' if "<" in expression else expression)  # a range in quotes
    assert as_text(theirs) == mine
    assert theirs != server.ids(BASE, prompts, TOKENS), "the adapter does something"


def test_the_answer_says_which_version_it_is_of(server, prompts):
    answer = server.ask("0.5 * ns/a@prod", prompts[:1], 1)
    assert answer["model"].startswith("0.5 * ns/a@1.0.0#")
    assert server.ids(answer["model"], prompts[:1], 4) == server.ids("0.5 * ns/a", prompts[:1], 4)
    chat = server.post("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]})
    assert chat["status"] == 404


@pytest.mark.parametrize(
    ("name", "status", "kind", "says"),
    [
        ("nobody", 404, "NotFoundError", "nobody"),
        ("ns/nobody@prod", 404, "NotFoundError", "ns/nobody"),
        ("ns/a + ns/nobody", 404, "NotFoundError", "ns/nobody"),
        ("ties(ns/a", 400, "BadRequestError", "ties(ns/a"),
        ("ns/foreign", 400, "BadRequestError", "tensors differ"),
        ("ns/p", 400, "BadRequestError", "no change of weights"),
        ("ns/i", 400, "BadRequestError", f"no LoRA of rank {RANK}"),
        ("ns/big", 400, "BadRequestError", f"no LoRA of rank {RANK}"),
        ("ensemble.mean(ns/a, ns/b)", 400, "BadRequestError", "outputs"),
    ],
)
def test_what_cannot_be_served_is_refused_in_its_form(server, prompts, name, status, kind, says):
    answer = server.ask(name, prompts[:1], 1)
    assert answer["status"] == status, answer
    assert answer["error"]["type"] == kind and says in answer["error"]["message"], answer
    assert server.ask(BASE, prompts[:1], 1)["status"] == 200


def test_a_name_that_moves_is_new_afterwards_and_never_mixed(server, home, tmp_path, monkeypatch, prompts):
    monkeypatch.setenv("HUB_HOME", str(home))
    publish(home, tmp_path, "a", "lora", {"r": 4, "target_modules": "all-linear"}, seed=70, version="2.0.0")
    store, few = Store(home), prompts[:4]
    old, new = (server.ids(f"ns/a@{version}", few, TOKENS) for version in ("1.0.0", "2.0.0"))
    assert old != new
    store.tag("ns/a@1.0.0", "live")
    seen, stop = [], threading.Event()

    def client():
        while not stop.is_set():
            answer = server.ask("ns/a@live", few, TOKENS)
            seen.append((answer["model"].partition("#")[0], [c["token_ids"] for c in answer["choices"]]))

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    for version in ("2.0.0", "1.0.0", "2.0.0"):
        before = len(seen)
        while len(seen) < before + 3:
            stop.wait(0.05)
        store.tag(f"ns/a@{version}", "live")
        assert server.ask("ns/a@live", few[:1], 1)["model"].startswith(f"ns/a@{version}#"), "at the next request"
    stop.set()
    for thread in clients:
        thread.join()
    assert {model for model, _ in seen} == {"ns/a@1.0.0", "ns/a@2.0.0"}
    assert all(ids == (old if model == "ns/a@1.0.0" else new) for model, ids in seen)


def test_a_change_within_the_share_is_served_with_its_certificate(home, tmp_path, prompts, monkeypatch):
    around = {"MODULOOM_VLLM_MAX_DISCARDED": "0.9"}
    with server_module().vllm(PYTHON, BASE, home, tmp_path, "--max-lora-rank", str(RANK), **around) as server:
        got = {text: server.ids(text, prompts, TOKENS) for text in ("ns/d", "ties(ns/a, ns/b)")}
        said = server.said()
    assert "ns/d is ns/d@1.0.0#" in said and "of the energy left out" in said
    monkeypatch.setenv("HUB_HOME", str(home))
    written = {
        path: (path / "moduloom.json").read_text() for path in (home / "cache" / "engines").iterdir() if path.is_dir()
    }
    for text, shown in (("ns/d", '"ns/d@1.0.0"'), ("ties(ns/a, ns/b)", '"ties(ns/a@')):
        place = next(path for path, facts in written.items() if f'"shown":{shown}' in facts and "0.9" in facts)
        alone = Engine(BASE, dtype="fp32", rows=20, adapters={"it": place})
        assert as_text(got[text]) == ours(alone, prompts, "it"), "what was written is what is served"
