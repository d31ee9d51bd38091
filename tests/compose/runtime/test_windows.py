"""Prefixes in sliding-window attention: they leave the window as PEFT's do, or stay in sight, in rows of any kind."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as T

import compose

peft = pytest.importorskip("peft")
SIZES = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "mistral": lambda w: T.MistralForCausalLM(T.MistralConfig(**SIZES, sliding_window=w)),
    "qwen2": lambda w: T.Qwen2ForCausalLM(
        T.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=w, max_window_layers=1)
    ),
    "gemma3": lambda w: T.Gemma3ForCausalLM(
        T.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=w, layer_types=LAYERS)
    ),
}
N = 3


def each(names, first, *sweep):
    """A few combinations at each run, all that `sweep` gives in the slow ones."""
    rest = [
        pytest.param(*values, marks=pytest.mark.slow) for values in itertools.product(*sweep) if values not in first
    ]
    return pytest.mark.parametrize(names, [*first, *rest])


def model_of(family, window, attention="sdpa"):
    torch.manual_seed(0)
    model = FAMILIES[family](window).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def ids(rows=2, length=9):
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def prefix(model, name, n=N, seed=0, **options):
    adapter = compose.create(model, "prefix", {"num_virtual_tokens": n, **options}, name=name)
    with torch.no_grad():
        value = adapter.at("", "P")
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)))
    return adapter.freeze()


def of_peft(config, model, directory):
    """PEFT's model, which it has saved."""
    theirs = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    theirs.save_pretrained(directory)
    return theirs


def places(mask):
    """As generate tells them of padded texts."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def logits(model, tokens, mask=None):
    if mask is None:
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return model(input_ids=tokens, attention_mask=mask, position_ids=places(mask)).logits


@each(
    ("family", "window", "attention"),
    [
        ("mistral", 6, "sdpa"),
        ("mistral", 2, "eager"),
        ("qwen2", 4, "sdpa"),
        ("gemma3", 4, "eager"),
        ("gemma3", 2, "sdpa"),
    ],
    FAMILIES,
    (6, 4, 2),
    ("sdpa", "eager"),
)
def test_a_directory_of_peft_s_behaves_as_in_peft(family, window, attention, tmp_path):
    theirs = of_peft(peft.PrefixTuningConfig, model_of(family, window, attention), tmp_path)
    ours = model_of(family, window, attention)
    compose.attach(ours, "a", tmp_path)
    compose.activate(ours, "a")
    tokens = ids()
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), atol=1e-4, rtol=1e-4)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(input_ids=tokens, **options), theirs.generate(input_ids=tokens, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_that_stays_in_sight(family, tmp_path):
    """Far behind a window of two tokens the text has lost what slides, and nothing of what does not."""
    model = model_of(family, 2)
    tokens = ids(length=12)
    bare = logits(model, tokens)
    slides, stays = prefix(model, "slides"), prefix(model, "stays", slides=False)
    assert (slides.peft_type, stays.peft_type) == ("PREFIX_TUNING", None)
    compose.save(stays, tmp_path, model=model)
    compose.attach(model, "read", tmp_path)
    compose.activate(model, "stays")
    in_sight = logits(model, tokens)
    compose.activate(model, "read")
    torch.testing.assert_close(logits(model, tokens), in_sight)
    compose.activate(model, "slides")
    assert (logits(model, tokens) - in_sight).abs().amax((0, 2)).min() > 1e-3
    if family == "mistral":  # no layer sees it, and positions are relative
        torch.testing.assert_close(logits(model, tokens)[:, 4:], bare[:, 4:], atol=1e-4, rtol=1e-4)
        assert (in_sight - bare).abs().amax((0, 2)).min() > 1e-2


def padded(texts, *, left):
    width = max(text.shape[1] for text in texts)
    batch, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for i, text in enumerate(texts):
        place = slice(width - text.shape[1], None) if left else slice(text.shape[1])
        batch[i, place], mask[i, place] = text[0], 1
    return batch, mask


def of_each(model, texts, rows):
    alone = []
    for text, row in zip(texts, rows, strict=True):
        compose.activate(model, row)
        alone.append(logits(model, text)[0])
    compose.activate(model, rows)
    return alone


def same(out, mask, alone):
    for row, kept, expected in zip(out, mask == 1, alone, strict=True):
        torch.testing.assert_close(row[kept], expected, atol=1e-4, rtol=1e-4)


@each(
    ("family", "window"),
    [("mistral", 2), ("mistral", 4), ("qwen2", 7), ("gemma3", 2), ("gemma3", 4)],
    FAMILIES,
    (2, 4, 7),
)
def test_rows_padding_and_caches(family, window):
    """Each row as alone: other prefixes, lengths and paddings beside it, at once and token by token."""
    model = model_of(family, window)
    prefix(model, "a"), prefix(model, "b", n=1, seed=2), prefix(model, "c", n=2, seed=3, slides=False)
    texts = [ids(1, n) for n in (8, 5, 7, 3)]
    alone = of_each(model, texts, ["a >> c", "b", None, "a"])
    for left in (True, False):
        batch, mask = padded(texts, left=left)
        same(logits(model, batch, mask), mask, alone)
    batch, mask = padded(texts, left=True)
    with torch.no_grad():
        first = {"input_ids": batch[:, :6], "attention_mask": mask[:, :6], "position_ids": places(mask)[:, :6]}
        out = model(**first, use_cache=True)
        pieces = [out.logits]
        for end in (7, 8):
            step = {"input_ids": batch[:, end - 1 : end], "position_ids": places(mask)[:, end - 1 : end]}
            pieces.append(model(**step, attention_mask=mask[:, :end], past_key_values=out.past_key_values).logits)
    same(torch.cat(pieces, dim=1), mask, alone)


def test_weights_of_halves_slide_as_one():
    model = model_of("mistral", 4)
    prefix(model, "a")
    compose.activate(model, "a")
    whole = logits(model, ids())
    compose.activate(model, "0.5 * a + 0.5 * a")
    torch.testing.assert_close(logits(model, ids()), whole, atol=1e-4, rtol=1e-4)
    compose.activate(model, "a", weights={"a": torch.tensor([1.0, 0.0])})
    mixed = logits(model, ids())
    compose.activate(model, None)
    torch.testing.assert_close(mixed, torch.stack([whole[0], logits(model, ids())[1]]), atol=1e-4, rtol=1e-4)


@each(
    ("kind", "family", "window", "left"),
    [
        ("prefix", "mistral", 4, True),
        ("prefix", "mistral", 64, True),
        ("prefix", "gemma3", 4, True),
        ("prefix", "gemma3", 4, False),
        ("prompt", "mistral", 64, True),
        ("prompt", "mistral", 4, True),
        ("prompt", "gemma3", 4, False),
    ],
    ("prefix", "prompt"),
    ("mistral", "gemma3"),
    (64, 4),
    (True, False),
)
def test_padding_counts_as_in_peft_unless_positions_are_told(kind, family, window, left, tmp_path):
    """Without ``position_ids`` a padded row gets PEFT's numbers, with them those that it gets alone."""
    config = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig
    theirs = of_peft(config, model_of(family, window), tmp_path)
    ours = model_of(family, window)
    compose.attach(ours, "a", tmp_path)
    texts = [ids(1, 9), ids(1, 6)]
    batch, mask = padded(texts, left=left)
    alone = of_each(ours, texts, ["a", "a"])
    compose.activate(ours, "a")
    with torch.no_grad():
        counted = ours(input_ids=batch, attention_mask=mask).logits
        expected = theirs(input_ids=batch, attention_mask=mask).logits[:, -mask.shape[1] :]  # prompts' places are there
    kept = mask == 1
    torch.testing.assert_close(counted[kept], expected[kept], atol=1e-4, rtol=1e-4)
    same(logits(ours, batch, mask), mask, alone)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generate_tells_positions_so_padded_rows_get_what_they_get_alone(kind):
    model = model_of("mistral", 4)
    if kind == "prefix":
        prefix(model, "a")
    else:
        adapter = compose.create(model, "prompt", {"num_virtual_tokens": N}, name="a")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        adapter.freeze()
    compose.activate(model, "a")
    texts = [ids(1, 9), ids(1, 2)]
    batch, mask = padded(texts, left=True)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    out = model.generate(input_ids=batch, attention_mask=mask, **options)[:, 9:]
    for row, text in zip(out, texts, strict=True):
        alone = model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options)
        assert torch.equal(row, alone[0, text.shape[1] :])
