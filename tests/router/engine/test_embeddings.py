"""Vectors of texts are rows among others: of bases against transformers, of adapters against `compose`."""

from __future__ import annotations

import json

import pytest
import torch

import compose
from compose.base.model import load_base, tokenizer_of
from hub.errors import HubError, UsageError
from router.engine.engine import Engine
from router.engine.pooling import pooling_of
from router.engine.request import ContextExceeded, Request

BASE = "builtin:tiny-lm"
TEXTS = ("The parties agree that", "def main(", "To be", " ".join(["It was a dark night"] * 40))


def states(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(torch.tensor([ids])).last_hidden_state[0]


def pooled(hidden: torch.Tensor, mode: str) -> torch.Tensor:
    return {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[mode]


@pytest.mark.parametrize("mode", ["mean", "last", "cls"])
def test_a_vector_is_what_the_last_layer_says(engine, published, mode):
    model, tokenizer = load_base(BASE, dtype="fp32"), tokenizer_of(BASE)
    for name in ("law", "code"):
        compose.attach(model, name, published.store.get(f"local/{name}"))
    rows = [Request(text=t, pooling=mode, adapter=a) for t in TEXTS for a in (None, "law", "0.5 * law + code")]
    beside = [Request(text=TEXTS[0], adapter="law", max_new_tokens=6), Request(text=TEXTS[1], adapter="mood")]
    found = engine.run([*rows, *beside])
    for request, result in zip(rows, found, strict=False):
        compose.activate(model, request.adapter)
        ids = tokenizer(request.text).input_ids
        wanted = pooled(states(model, ids), mode)
        torch.testing.assert_close(torch.tensor(result.embedding), wanted, atol=1e-4, rtol=1e-3)
        assert (result.read, result.written) == (len(ids), 0)
    assert [r.text or r.label for r in found[-2:]] == [r.text or r.label for r in engine.run(beside)]


def test_prompts_routers_and_heads_have_vectors_too(engine, routers):
    models = ["lead", "near", "arrow", "mood", "ties(law, code)"]
    rows = [Request(text=text, adapter=name, pooling="mean") for name in models for text in TEXTS]
    together = engine.run(rows)
    for request, result in zip(rows, together, strict=True):
        (alone,) = engine.run([request])
        assert result.embedding == pytest.approx(alone.embedding, abs=1e-4)
    assert len({result.embedding for result in together}) == len(rows)


def test_an_encoder_pools_its_texts_side_by_side(published, tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = tokenizer_of(BASE)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    encoder = Engine(tmp_path, store=published.store, dtype="fp32")
    found = encoder.run([Request(text=t, pooling=mode) for t in TEXTS[:3] for mode in ("auto", "mean")])
    for i, text in enumerate(TEXTS[:3]):
        hidden = states(model, tokenizer(text).input_ids)
        for result, mode in zip(found[2 * i :], ("cls", "mean"), strict=False):
            torch.testing.assert_close(torch.tensor(result.embedding), pooled(hidden, mode), atol=1e-4, rtol=1e-3)
    encoder.close()


def test_how_states_are_pooled_is_said_by_the_manifest_or_the_base(engine, published):
    (asked, last) = engine.run([Request(text="To be", pooling=mode) for mode in ("auto", "last")])
    assert asked.embedding == last.embedding
    assert pooling_of(engine.host.model, decodes=False) == "mean"
    published.publish("vectors", seed=9, hyperparameters={"pooling": "mean"})
    (asked, mean) = engine.run([Request(text="To be", pooling=mode, adapter="vectors") for mode in ("auto", "mean")])
    assert asked.embedding == mean.embedding


def test_what_has_no_vector_is_refused(engine):
    for request, error, words in (
        ({"adapter": "ensemble.mean(law, code)"}, UsageError, "ensemble"),
        ({"pooling": "max"}, UsageError, "pooling"),
        ({"text": "word " * 600}, ContextExceeded, "512"),
        ({"text": ""}, HubError, "empty"),
    ):
        with pytest.raises(error, match=words):
            engine.run([Request(**{"text": "To be", "pooling": "mean", **request})])
