"""Encoder-decoders: the encoder reads each row once, and rows of any adapters are answered side by side."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import compose
from hub.cli import main
from hub.errors import HubError, UsageError
from router.engine.engine import Engine
from router.engine.request import Request

TEXTS = ["w9 w8 w7", "w5", "w4 w6 w8 w10 w12 w14", "w20 w21"]
SHARED = ("lora", "ia3", "dora", "bottleneck", "prompt")  # `prefix` where a decoder does not make up its positions


def bart():
    from transformers import AutoModelForSeq2SeqLM, BartConfig

    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=53, d_model=32, max_position_embeddings=24, forced_eos_token_id=None,
        **sizes, **heads, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.generation_config.forced_bos_token_id = 4
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module", params=["t5", "bart"])
def translating(tiny, tokenizer, request):
    model = bart() if request.param == "bart" else tiny.model("t5")
    engine = Engine(model, tokenizer=tokenizer, rows=8)
    for seed, kind in enumerate((*SHARED, *(("prefix",) if request.param == "t5" else ()))):
        tiny.adapter(engine.host.model, kind, kind, seed=seed + 3, noise=0.3).freeze()
    yield engine
    engine.close()


def generated(engine, request) -> list[str]:
    """What transformers says of one row."""
    model, tokenizer, skip = engine.host.model, engine.host.tokenizer, len(engine.host.starts)
    ids = torch.tensor([tokenizer(request.text).input_ids])
    compose.activate(model, request.adapter)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens + skip - 1, do_sample=False
    )
    engine.host.forget()
    return tokenizer.decode(made[0, skip:], skip_special_tokens=True).split()


@pytest.mark.parametrize("prompted", [False, True])
def test_rows_are_answered_as_transformers_answers_each(translating, prompted):
    known = [name for name in translating.host.runtime.adapters if prompted or name != "prompt"]
    adapters = [None, *known, "0.5 * lora + ia3", "lora >> dora"]
    rows = [
        Request(text=TEXTS[i % 4], adapter=name, max_new_tokens=2 + 3 * (i % 4), scores=2)
        for i, name in enumerate(adapters * 2)
    ]
    answers = translating.run(rows)
    assert [a.text.split() for a in answers] == [generated(translating, row) for row in rows]
    assert len({a.text for a in answers}) > 4
    assert [a.read for a in answers] == [len(row.text.split()) for row in rows]
    assert all(len(a.tokens) == a.written - (a.finish == "stop") for a in answers)


def test_the_encoder_runs_once(translating):
    read = []
    hook = translating.host.model.get_encoder().register_forward_hook(lambda *_: read.append(1))
    answers = translating.run([Request(text=t, adapter="lora", max_new_tokens=9) for t in TEXTS])
    hook.remove()
    assert max(a.written for a in answers) > 2
    assert len(read) == 1


def test_sampling_does_not_depend_on_the_neighbours(translating):
    rows = [Request(text=TEXTS[s % 4], adapter="ia3", temperature=1.5, seed=s, max_new_tokens=5) for s in range(6)]
    together = [a.text for a in translating.run(rows)]
    assert together == [translating.run([row])[0].text for row in rows]
    assert len(set(together)) > 2


def test_what_an_encoder_decoder_cannot_do_is_said_before_anything_runs(translating):
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        translating.targets.get("ensemble.demix(lora, ia3)")
    if translating.host.context is not None:  # BART's own places
        with pytest.raises(HubError, match="25 tokens and 4 new ones are more than the 24"):
            translating.run([Request(text="w5 " * 25, max_new_tokens=4)])
        with pytest.raises(HubError, match="23 new ones are more than the 24"):
            translating.run([Request(text="w5", max_new_tokens=23)])
        assert translating.run([Request(text="w5 " * 24, max_new_tokens=22)])[0].read == 24


def test_run_and_serve_take_one_from_a_directory(tiny, tokenizer, tmp_path, jsonl):
    from starlette.testclient import TestClient

    from router.serving.app import create_app

    place, model = tmp_path / "t5", tiny.model("t5")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    path = jsonl([{"text": text} for text in TEXTS])
    found = CliRunner().invoke(main, ["run", str(path), "--base", str(place), "--max-new-tokens", "6"])
    assert found.exit_code == 0, found.output
    engine = Engine(place)
    wanted = [generated(engine, Request(text=text, max_new_tokens=6)) for text in TEXTS]
    assert [json.loads(line)["output"].split() for line in found.stdout.splitlines()] == wanted
    tiny.adapter(engine.host.model, "lora", "mine", seed=5, noise=0.3).freeze()
    asked = [(text, name) for text in TEXTS for name in (None, "mine")]
    with TestClient(create_app(engine)) as client:
        told = [
            client.post("/v1/completions", json={"prompt": t, "model": n or "", "max_tokens": 6, "temperature": 0})
            for t, n in asked
        ]
    texts = [answer.json()["choices"][0]["text"].split() for answer in told]
    assert texts == [generated(engine, Request(text=t, adapter=n, max_new_tokens=6)) for t, n in asked]
