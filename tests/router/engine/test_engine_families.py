"""The engine on other families: decoders that generate and classify in one batch, encoders that classify."""

from __future__ import annotations

import pytest
import torch

import compose
from compose.errors import KindError
from hub.errors import HubError, UsageError
from router.engine.engine import Engine
from router.engine.request import Request

TEXTS = ["w9 w8 w7", "w5", "w4 w6 w8 w10 w12 w14", "w20 w21"]


def headed(tiny, family, kind, classes, place):
    """Directory of an adapter with its own head, and the logits it gives on a model made for it."""
    model = tiny.model(family, task="classification", num_labels=classes)
    base = tiny.model(family, task="lm" if family in tiny.decoding else "classification")
    model.base_model.load_state_dict(base.base_model.state_dict())
    children = [name for name, child in model.named_children() if name != model.base_model_prefix]
    adapter = tiny.adapter(model, kind, "own", seed=classes, modules_to_save=tuple(children)).freeze()
    compose.save(adapter, place, model=model, task="classification")
    compose.activate(model, "own")

    def probabilities(ids):
        with torch.no_grad():
            return model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0].softmax(-1).tolist()

    return probabilities


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bert", "roberta", "deberta-v2"])
def test_heads_of_different_sizes_in_one_batch(tiny, tokenizer, family, tmp_path):
    wanted = {
        "two": headed(tiny, family, "lora", 2, tmp_path / "two"),
        "five": headed(tiny, family, "bias" if family != "llama" else "ia3", 5, tmp_path / "five"),
    }
    decodes = family in tiny.decoding
    model = tiny.model(family, task="lm" if decodes else "classification")
    engine = Engine(model, tokenizer=tokenizer, adapters={name: tmp_path / name for name in wanted}, rows=8)
    tiny.adapter(engine.host.model, "lora", "plain", seed=9).freeze()
    rows = [Request(text=text, adapter=name, scores=5) for text in TEXTS for name in wanted]
    extra = [Request(text=text, adapter=name, max_new_tokens=4) for text in TEXTS[:2] for name in ("plain", None)]
    answers = engine.run([*rows, *(extra if decodes else [])])
    for row, answer in zip(rows, answers, strict=False):
        expected = wanted[row.adapter](torch.tensor(tokenizer(row.text).input_ids))
        found = dict(answer.scores)
        assert [found[f"LABEL_{i}"] for i in range(len(expected))] == pytest.approx(expected, abs=2e-5)
    for row, answer in zip(extra, answers[len(rows) :], strict=decodes):
        ids = torch.tensor([tokenizer(row.text).input_ids])
        compose.activate(engine.host.model, row.adapter)
        made = engine.host.model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
        assert answer.text.split() == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split()
    engine.host.forget()
    if not decodes:
        with pytest.raises(UsageError, match="cannot continue a text"):
            engine.run([Request(text="w5")])
    engine.close()


def test_a_base_that_cannot_tell_rows_apart_answers_each_alone(tiny, tokenizer, tmp_path):
    """What refuses the batch as a whole, as DeBERTa's shared projections do, is no row's fault."""
    wanted = {f"a{n}": headed(tiny, "deberta-v2", "lora", n, tmp_path / f"a{n}") for n in (2, 3, 5)}
    model = tiny.model("deberta-v2", task="classification")
    engine = Engine(model, tokenizer=tokenizer, adapters={name: tmp_path / name for name in wanted}, rows=8)
    rows = [Request(text=text, adapter=name, scores=5) for text in TEXTS for name in wanted]
    with pytest.raises(KindError, match="rows of a batch cannot have adapters of their own"):
        engine.run(rows)  # makes them resident
        compose.activate(engine.host.model, [*engine.host.runtime.adapters][:2])
    engine.host.forget()
    for row, answer in zip(rows, engine.run(rows), strict=True):
        expected = wanted[row.adapter](torch.tensor(tokenizer(row.text).input_ids))
        assert [p for _, p in sorted(answer.scores)] == pytest.approx(expected, abs=2e-5)
    nobody = Request(text="w5", adapter="a9")
    assert isinstance(engine.run([*rows[:3], nobody], strict=False)[3], HubError)
    engine.close()


def test_a_quantized_base(published):
    engine = Engine("builtin:tiny-lm", store=published.store, quantize="nf4", dtype="fp32", rows=4)
    rows = [Request(text="To be", adapter=a, max_new_tokens=3, scores=1) for a in ("law", "mood", "topic", None)]
    answers = engine.run(rows)
    assert [a.label is None for a in answers] == [True, False, False, True]
    alone = [engine.run([row])[0] for row in rows]
    assert [(a.text, a.label) for a in alone] == [(a.text, a.label) for a in answers]
    engine.close()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_places_before_a_text_count(tiny, tokenizer, kind, tmp_path):
    """Learned positions end: a prompt of 3 leaves 45 of 48 places to a text and its continuation."""
    engine = Engine(tiny.model("gpt2"), tokenizer=tokenizer, rows=4)
    tiny.adapter(engine.host.model, kind, "front", seed=1, num_virtual_tokens=3).freeze()
    fits, last, over = (Request(text="w5 " * n, adapter="front", max_new_tokens=4) for n in (9, 41, 42))
    answers = engine.run([fits, over, last], strict=False)
    assert "45 tokens and 4 new ones are more than the 48" in answers[1].message
    assert [len(a.text.split()) for a in (answers[0], answers[2])] == [4, 4]
    engine.close()

    headed(tiny, "bert", kind, 2, tmp_path / "headed")
    engine = Engine(tiny.model("bert", task="classification"), tokenizer=tokenizer, adapters={"h": tmp_path / "headed"})
    front = engine.sources.known("h").front
    assert front > 0
    assert engine.run([Request(text="w5 " * 60, adapter="h")])[0].read == 48 - front
    engine.close()


def test_a_row_that_breaks_the_library_leaves_the_others_alone(tiny, tokenizer):
    engine = Engine(tiny.model("gpt2"), tokenizer=tokenizer, rows=4)
    engine.host.context = None  # as of a base whose configuration does not say it
    rows = [Request(text="w5 " * n, max_new_tokens=4) for n in (3, 60, 5)]
    answers = engine.run(rows, strict=False)
    assert "IndexError" in answers[1].message
    assert [answers[i].text for i in (0, 2)] == [engine.run([rows[i]])[0].text for i in (0, 2)]
    engine.close()
