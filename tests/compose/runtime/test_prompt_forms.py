"""Prompts at the slots of a template, and prompts made from the text."""

from __future__ import annotations

import pytest
import torch

from compose.errors import KindError
from compose.runtime.model_runtime import activate

SLOT = 50


def test_slots_get_their_tokens_wherever_the_template_puts_them(tiny, close):
    model = tiny.model("bert")
    adapter = tiny.adapter(model, "prompt", "a", slot_token=SLOT, num_virtual_tokens=3).freeze()
    ids = torch.tensor([[SLOT, 7, 8, SLOT, 9, SLOT], [5, SLOT, 6, 1, 1, 1]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    table = model.get_input_embeddings().weight
    rows = table[ids].clone().detach()
    p = adapter.at("", "P")
    rows[0, [0, 3, 5]], rows[1, 1] = p, p[0]
    expected = model(inputs_embeds=rows, attention_mask=mask).logits
    activate(model, ["a", "a"])
    ours = model(input_ids=ids, attention_mask=mask).logits
    assert ours.shape[1] == 6  # nothing was put in front
    torch.testing.assert_close(ours, expected)
    with pytest.raises(KindError, match="more than the 3 slots of prompt 'a'"):
        model(input_ids=torch.full((2, 4), SLOT))


@pytest.mark.parametrize("instance", ["table", "mlp"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_prompt_made_from_the_text(tiny, close, family, instance):
    """A row alone is the row in a padded mixed batch; the same tokens give the same prompt."""
    model = tiny.model(family)
    options = {"instance": instance, "generator_width": 6, "num_virtual_tokens": 4}
    adapter = tiny.adapter(model, "prompt", "a", **options).freeze()
    tiny.adapter(model, "prompt", "b", seed=2, size=1).freeze()
    ids = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 7], [7, 6, 5, 4]])
    made = adapter.prompt().of(ids)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    rows, exprs = tiny.rows(6, 2, 5, 4), ["a", "a", "b >> a", None]  # the second text is shorter than the prompt
    alone = []
    for row, expr in zip(rows, exprs, strict=True):
        activate(model, expr)
        alone += tiny.logits(model, tiny.batch(family, [row]))
    activate(model, exprs)
    for side in ("left", "right"):
        close(tiny.logits(model, tiny.batch(family, rows, side)), alone)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_row_of_a_batch_has_the_prompt_of_its_own_text(tiny, close, family):
    """One adapter for all rows, and rows folded two to an expression."""
    model = tiny.model(family)
    tiny.adapter(model, "prompt", "a", instance="table", seed=1, noise=0.1)
    tiny.adapter(model, "prompt", "b", instance="mlp", seed=2, noise=0.1)
    rows = tiny.rows(6, 4, 7, 5)
    alone = {}
    for name in "ab":
        activate(model, name)
        alone[name] = [tiny.logits(model, tiny.batch(family, [row]))[0] for row in rows]
        close(tiny.logits(model, tiny.batch(family, rows)), alone[name])
    activate(model, ["a", "b"])
    close(tiny.logits(model, tiny.batch(family, rows)), alone["a"][:2] + alone["b"][2:])


def test_a_generator_learns_with_the_table_fixed(tiny):
    model = tiny.model("llama")
    adapter = tiny.adapter(model, "prompt", "a", instance="mlp", generator_width=4)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 4 * 32 + 4
    activate(model, "a")
    model(**tiny.batch("llama", tiny.rows(5, 3))).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "moduloom" not in n)


def test_a_prompt_made_from_the_text_needs_the_text(tiny):
    model = tiny.model("llama")
    tiny.adapter(model, "prompt", "a", instance="table")
    activate(model, "a")
    with pytest.raises(KindError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
