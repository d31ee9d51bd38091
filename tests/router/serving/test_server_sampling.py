"""How tokens are chosen over HTTP: against transformers' generate where that can say it, and by what each one means."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from starlette.testclient import TestClient

from compose.base.model import load_base, tokenizer_of
from router.engine.engine import Engine
from router.serving.app import create_app

BASE = "builtin:tiny-lm"
PROMPT = "The parties agree that the"


@pytest.fixture(scope="module")
def client(published):
    engine = Engine(BASE, store=published.store, dtype="fp32", rows=8)
    with TestClient(create_app(engine, names=["tiny"], origins=["https://example.org"])) as client:
        yield client


@pytest.fixture(scope="module")
def reference():
    return load_base(BASE, dtype="fp32"), tokenizer_of(BASE)


def ask(client, status=200, **fields):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, **fields}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def text(client, **fields) -> str:
    return ask(client, **fields)["choices"][0]["text"]


def test_a_repetition_penalty_and_biases_are_those_of_transformers(client, reference):
    model, tokenizer = reference
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for penalty, bias in ((1.3, {}), (1.0, {7: -100.0, 20: 3.0}), (1.5, {20: -5.0})):
        changes = {"sequence_bias": [[[t], b] for t, b in bias.items()]} if bias else {}
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=penalty, **changes)
        fields = {"repetition_penalty": penalty, "logit_bias": {str(t): b for t, b in bias.items()}}
        told = tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
        assert text(client, **fields) == told


def test_penalties_count_what_was_written(client, reference):
    model, tokenizer = reference
    ids = tokenizer(PROMPT).input_ids
    for frequency, presence in ((2.0, 0.0), (0.0, 2.0), (1.0, -0.5)):
        written: list[int] = []
        for _ in range(12):
            with torch.no_grad():
                logits = model(torch.tensor([ids + written])).logits[0, -1]
            for token in set(written):
                logits[token] -= frequency * written.count(token) + presence
            written.append(int(logits.argmax()))
            if written[-1] == tokenizer.eos_token_id:
                break
        told = tokenizer.decode(written, skip_special_tokens=True)
        assert text(client, frequency_penalty=frequency, presence_penalty=presence) == told


def test_only_likely_tokens_are_drawn(client):
    greedy = text(client)
    hot = {"temperature": 5.0, "seed": 3}
    assert text(client, **hot) != greedy
    assert text(client, **hot, top_k=1) == greedy
    assert text(client, **hot, min_p=1.0) == greedy
    assert text(client, **hot, top_k=-1, min_p=0) == text(client, **hot)
    for n in range(4):
        scored = ask(client, temperature=5.0, seed=n, top_k=3, logprobs=3)["choices"][0]["logprobs"]
        for chosen, best in zip(scored["token_logprobs"], scored["top_logprobs"], strict=True):
            assert chosen >= min(best.values()) - 1e-5


def test_a_row_that_is_penalized_does_not_disturb_its_neighbours(client):
    alone = text(client)
    both = [text(client, frequency_penalty=2.0), text(client, logit_bias={"7": 50})]
    assert len({alone, *both}) > 1
    assert [c["text"] for c in ask(client, prompt=[PROMPT] * 3)["choices"]] == [alone] * 3


def test_the_chosen_token_is_among_the_best(client):
    for n in range(3):
        scored = ask(client, temperature=5.0, seed=n, logprobs=1)["choices"][0]["logprobs"]
        for token, log_prob, best in zip(
            scored["tokens"], scored["token_logprobs"], scored["top_logprobs"], strict=True
        ):
            assert best[token] == log_prob


def test_tokens_as_prompts(client, reference):
    ids = reference[1](PROMPT).input_ids
    alone = text(client)
    assert text(client, prompt=ids) == alone
    assert [c["text"] for c in ask(client, prompt=[ids, ids])["choices"]] == [alone] * 2
    assert "has no token" in ask(client, 400, prompt=[10**6])["error"]["message"]
    assert "has no token" in ask(client, 400, logit_bias={"1000000": 1})["error"]["message"]
    assert ask(client, 400, prompt=[-1])["error"]["type"] == "invalid_request_error"
    told = client.post("/tokenize", json={"prompt": PROMPT}).json()
    assert (told["tokens"], told["count"], told["max_model_len"]) == (ids, len(ids), 512)
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == reference[1].decode(ids)


@pytest.mark.parametrize("words", [1, 40])
def test_echo_scores_the_prompt_as_one_pass_over_it_does(client, reference, words):
    model, tokenizer = reference
    prompt = " ".join([PROMPT] * words)[:900]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = model(ids).logits[0].log_softmax(-1)
    wanted = log_p[:-1].gather(1, ids[0, 1:, None])[:, 0]
    for most in (0, 1):
        answer = ask(client, prompt=[prompt, PROMPT], echo=True, logprobs=2, max_tokens=most)
        choice = answer["choices"][0]
        scored = choice["logprobs"]
        assert choice["text"].startswith(prompt)
        assert scored["token_logprobs"][0] is None
        assert scored["top_logprobs"][0] is None
        assert len(scored["tokens"]) == ids.shape[1] + most
        found = torch.tensor(scored["token_logprobs"][1 : ids.shape[1]])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        best = [max(b.values()) for b in scored["top_logprobs"][1 : ids.shape[1]]]
        assert best == pytest.approx(log_p[:-1].max(1).values.tolist(), abs=1e-4)
        assert (choice["text"] == prompt) == (most == 0)
        assert answer["usage"]["completion_tokens"] == 2 * most
    assert text(client, echo=True) == PROMPT + text(client)
    assert "echo" in ask(client, 400, max_tokens=0)["error"]["message"]
    assert ask(client, 400, echo=True, stream=True)["error"]["param"] == "echo"
    ensemble = ask(client, 400, echo=True, logprobs=1, model="ensemble.mean(law, code)")
    assert "prompt" in ensemble["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("presence_penalty", -2.5),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_name_of_their_field(client, field, value):
    assert ask(client, 400, **{field: value})["error"]["param"].startswith(field)


def test_the_base_has_the_names_it_was_given(client):
    assert text(client, model="tiny") == text(client, model=BASE) == text(client)
    assert text(client, model="tiny:law") == text(client, model="law")
    told = client.get("/v1/models").json()["data"]
    assert (told[0]["id"], told[0]["root"]) == ("tiny", BASE)
    assert all(entry["parent"] == "tiny" for entry in told[1:])
    assert client.get(f"/v1/models/{BASE}").json()["parent"] is None


def test_pages_of_the_origins_that_were_named_may_ask(client):
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
    other = client.options("/v1/completions", headers={**asked, "Origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers


def test_answers_are_what_the_openai_package_reads(client):
    types = pytest.importorskip("openai.types", reason="openai is not installed")
    for fields in ({}, {"logprobs": 2}, {"n": 2, "temperature": 1}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
        told = ask(client, **fields)
        for choice in told["choices"] if "echo" in fields else ():  # the first token's are null
            for name in ("token_logprobs", "top_logprobs"):
                assert choice["logprobs"][name].pop(0) is None
        read = types.Completion.model_validate(told, strict=True)
        assert all(choice.finish_reason in ("stop", "length") for choice in read.choices)
        assert all(math.isfinite(p) for c in read.choices if c.logprobs for p in c.logprobs.token_logprobs if p)
