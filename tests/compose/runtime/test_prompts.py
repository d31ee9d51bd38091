"""Prompts before the text: where they stand, what becomes of masks, positions, labels and outputs, and of caches."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from compose.errors import KindError
from compose.runtime.model_runtime import activate, eject, runtime


def near(a, b, bound=1e-5):
    return (a - b).abs().max() <= bound * max(1.0, b.abs().max())


def prompted(tiny, family, task="lm", exprs="p", **config):
    model = tiny.model(family, task=task, **config)
    tiny.adapter(model, "prompt", "p").freeze()  # 3 virtual tokens
    tiny.adapter(model, "prompt", "q", seed=2, size=1).freeze()  # 2
    activate(model, exprs)
    return model


def by_hand(tiny, family, prompt, rows, task="lm", **options):
    """The bare model on embeddings with the prompt in front, one unpadded row at a time."""
    model = tiny.model(family, task=task)
    out = []
    for row in rows:
        embeds = torch.cat([prompt, model.get_input_embeddings()(row).detach()])[None]
        with torch.no_grad():
            out.append(model(inputs_embeds=embeds, **options))
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "roberta", "opt", "gpt_neox"])
def test_it_is_the_embeddings_before_the_text(tiny, family):
    model = prompted(tiny, family)
    rows = tiny.rows(5, 3)
    prompt = runtime(model).adapters["p"].at("", "P")
    expected = [out.logits[0, 3:] for out in by_hand(tiny, family, prompt, rows)]
    for side in ("right", "left"):
        got = tiny.logits(model, tiny.batch(family, rows, side))
        assert all(near(a, b) for a, b in zip(got, expected, strict=True)), side


def test_before_an_encoder_decoder_it_stands_in_the_encoder(tiny):
    model, bare = prompted(tiny, "t5"), tiny.model("t5")
    (row,) = tiny.rows(5)
    embeds = torch.cat([runtime(model).adapters["p"].at("", "P"), bare.shared(row)])[None]
    targets = torch.tensor([[1, 7, 9]])
    with torch.no_grad():
        expected = bare(inputs_embeds=embeds, decoder_input_ids=targets).logits
        assert near(model(input_ids=row[None], decoder_input_ids=targets).logits, expected)
        states = model.get_encoder()(input_ids=row[None])
        assert states.last_hidden_state.shape[1] == 8  # what cross-attention will read
        assert near(model(encoder_outputs=states, decoder_input_ids=targets).logits, expected)


@pytest.mark.parametrize("masked", [True, False])
def test_rows_of_an_encoder_decoder_without_a_mask(tiny, masked):
    model = prompted(tiny, "t5", exprs=["p", "q", None])
    rows, targets = tiny.rows(4, 4, 4), torch.tensor([[1, 7]] * 3)
    mask = {"attention_mask": torch.ones(3, 4, dtype=torch.long)} if masked else {}
    with torch.no_grad():
        together = model(input_ids=torch.stack(rows), decoder_input_ids=targets, **mask).logits
        states = model.get_encoder()(input_ids=torch.stack(rows), **mask)
        again = model(encoder_outputs=states, decoder_input_ids=targets, **mask).logits
        assert near(again, together)
        for i, expr in enumerate(["p", "q", None]):
            activate(model, expr)
            assert near(together[i : i + 1], model(input_ids=rows[i][None], decoder_input_ids=targets[:1]).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_embeddings_instead_of_ids(tiny, family):
    model = prompted(tiny, family, exprs=["p", "q", None])
    batch = tiny.batch(family, tiny.rows(5, 3, 4), "left")
    expected = tiny.logits(model, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    with torch.no_grad():
        got = model(inputs_embeds=embeds, **rest).logits
    kept = [y[m.bool()] for y, m in zip(got, batch["attention_mask"], strict=True)]
    assert all(near(a, b) for a, b in zip(kept, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "opt", "gpt_neox", "qwen2"])
def test_without_mask_or_positions(tiny, family):
    model = prompted(tiny, family, exprs=["p", "q", None])
    rows = tiny.rows(4, 4, 4)
    with torch.no_grad():
        bare_call = model(torch.stack(rows)).logits  # by position, as users do
    assert bare_call.shape[1] == 4
    assert near(bare_call, torch.stack(tiny.logits(model, tiny.batch(family, rows))))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_labels_belong_to_the_text(tiny, family):
    """The loss of a mixed batch is that of its rows; the last virtual token predicts the first of the text."""
    exprs, rows = ["p", "q", None], tiny.rows(5, 3, 4)
    model = prompted(tiny, family, exprs=exprs)
    batch = tiny.batch(family, rows)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    kept = labels.clone()
    with torch.no_grad():
        together = model(**batch, labels=labels).loss
        alone = []
        for row, expr in zip(rows, exprs, strict=True):
            activate(model, expr)
            alone.append(model(**tiny.batch(family, [row]), labels=row[None]).loss)
    assert torch.equal(labels, kept)
    predicted = [len(row) - (expr is None and family != "bert") for row, expr in zip(rows, exprs, strict=True)]
    mean = sum(loss * n for loss, n in zip(alone, predicted, strict=True)) / sum(predicted)
    assert near(together, mean, 1e-4)

    prompt = runtime(model).adapters["p"].at("", "P")
    ignored = torch.cat([torch.full((3,), -100), rows[0]])[None]
    (expected,) = by_hand(tiny, family, prompt, rows[:1], labels=ignored)
    assert near(alone[0], expected.loss, 1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_classification_of_mixed_rows(tiny, family, side):
    """Whatever a head pools, the last token that is no padding or the first of the row, it is that of the row alone."""
    if side == "left" and family in ("bert", "roberta"):
        side = "right"  # these pool the first place, which a left-padded row does not fill
    model = prompted(tiny, family, "classification", exprs=["p", None, "q"])
    rows = tiny.rows(5, 3, 4)
    together = tiny.logits(model, tiny.batch(family, rows, side))
    for row, expr, got in zip(rows, ["p", None, "q"], together, strict=True):
        activate(model, expr)
        assert near(got, tiny.logits(model, tiny.batch(family, [row]))[0]), expr
    if family != "bert":
        activate(model, "p")
        (expected,) = by_hand(tiny, family, runtime(model).adapters["p"].at("", "P"), rows[:1], "classification")
        assert near(tiny.logits(model, tiny.batch(family, rows[:1]))[0], expected.logits[0])


def test_every_output_of_the_text_is_trimmed(tiny):
    model = prompted(tiny, "llama", exprs=["p", "q"])
    batch = tiny.batch("llama", tiny.rows(5, 3))
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
        assert out.logits.shape == (2, 5, 53)
        assert all(h.shape[:2] == (2, 5) for h in out.hidden_states)
        as_tuple = model(**batch, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], out.logits)
        # a head that multiplies fewer positions may add up in another order
        torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, out.logits[:, -2:])
        chosen = model(**batch, logits_to_keep=torch.tensor([0, 3])).logits
        torch.testing.assert_close(chosen, out.logits[:, [0, 3]])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_static_cache(tiny, family):
    model = prompted(tiny, family, exprs=["p", "q"])
    batch = tiny.batch(family, tiny.rows(5, 3), "left")
    whole = model(**batch, use_cache=False).logits.detach()
    cache = StaticCache(model.config, max_cache_len=8)
    out = []
    with torch.no_grad():
        for start, end in [(0, 3), (3, 4), (4, 5)]:
            step = {"attention_mask": batch["attention_mask"][:, :end], "past_key_values": cache}
            step |= {k: batch[k][:, start:end] for k in ("input_ids", "position_ids")}
            out.append(model(**step, use_cache=True).logits[:, -1])
    assert near(torch.stack(out[1:], 1), whole[:, 3:])
    short = StaticCache(model.config, max_cache_len=5)
    with pytest.raises(KindError, match="room for 5 tokens and this call needs 8"):
        model(**batch, past_key_values=short, use_cache=True)


def test_it_may_continue_in_pieces(tiny):
    """Chunked prefill: the prompt goes in with the first piece only."""
    model = prompted(tiny, "llama", exprs=["p", None])
    batch = tiny.batch("llama", tiny.rows(6, 6))
    whole = model(**batch).logits.detach()
    cache, out = None, []
    with torch.no_grad():
        for start, end in [(0, 2), (2, 5), (5, 6)]:
            result = model(input_ids=batch["input_ids"][:, start:end], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(result.logits)
    assert near(torch.cat(out, 1), whole)


def test_the_prompt_learns_through_checkpointing_and_short_rows(tiny):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, "prompt", "p")
    short = tiny.adapter(model, "prompt", "q", size=1)
    activate(model, ["p", "q", "p + q"])
    batch = tiny.batch("llama", tiny.rows(5, 3, 4))

    def gradients():
        model.zero_grad()
        model(**batch).logits.square().mean().backward()
        return [a.at("", "P").grad.clone() for a in (adapter, short)]

    plain = gradients()
    assert all(g.abs().sum(1).min() > 0 for g in plain)
    model.train()
    model.gradient_checkpointing_enable()
    assert all(near(a, b) for a, b in zip(gradients(), plain, strict=True))


@pytest.mark.parametrize(
    ("expr", "weights", "message"),
    [
        ("0.5 * p", None, "half"),
        ("p", {"p": 2.0}, "half"),
        ("p", {"p": torch.tensor([1.0, 0.5])}, "half"),
        ("p", {"p": torch.rand(2, 4)}, "half"),
    ],
)
def test_there_is_no_half_a_prompt(tiny, expr, weights, message):
    model = prompted(tiny, "llama")
    batch = tiny.batch("llama", tiny.rows(4, 4))
    before = tiny.logits(model, batch)
    with pytest.raises(KindError, match=message):
        activate(model, expr, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(tiny.logits(model, batch), before, strict=True))


def test_a_mask_of_another_form_is_refused(tiny):
    model = prompted(tiny, "llama")
    with pytest.raises(KindError, match="mask"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))


def test_options_that_mean_nothing_are_refused(tiny):
    model = tiny.model("llama")
    for options in ({"target_modules": ("q_proj",)}, {"layers": (0,)}):
        with pytest.raises(KindError, match="takes no target_modules"):
            tiny.adapter(model, "prompt", "p", **options)
    eject(model)
