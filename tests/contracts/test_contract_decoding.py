"""Cached decoding is uncached decoding, and ``generate`` treats the rows of a mixed batch as if each were alone."""

from __future__ import annotations

import pytest
import torch

from compose.runtime.model_runtime import activate


@pytest.fixture
def mixed(tiny, kind, decoder, dtype):
    model = tiny.model(decoder, dtype)
    tiny.adapter(model, kind, "a").freeze()
    tiny.adapter(model, kind, "b", seed=2, size=1).freeze()
    activate(model, ["a", None, "b"])
    return model


def steps(model, batch, decoder, n):
    """Logits of the last ``n`` tokens, decoded one by one with a cache."""
    name = "decoder_input_ids" if decoder == "t5" else "input_ids"
    ids = batch[name]
    total = ids.shape[1]
    fixed = {k: batch[k] for k in ("input_ids", "attention_mask")} if decoder == "t5" else {}
    cache, out = None, []
    with torch.no_grad():
        for start, end in [(0, total - n), *((i, i + 1) for i in range(total - n, total))]:
            options = {name: ids[:, start:end], "past_key_values": cache, "use_cache": True}
            if not fixed:
                options["attention_mask"] = batch["attention_mask"][:, :end]
                options["position_ids"] = batch["position_ids"][:, start:end]
            result = model(**{**fixed, **options})
            cache = result.past_key_values
            out.append(result.logits[:, -1:].float())
    return torch.cat(out[1:], dim=1)


def test_cached_is_uncached(tiny, close, mixed, kind, decoder, dtype):
    batch = tiny.batch(decoder, tiny.rows(6, 4, 5), "left")
    with torch.no_grad():
        whole = mixed(**batch, use_cache=False).logits.float()
    close(list(steps(mixed, batch, decoder, 3)), list(whole[:, -3:]), dtype)


def test_generate(tiny, kind, decoder):
    model = tiny.model(decoder)
    tiny.adapter(model, kind, "a").freeze()
    tiny.adapter(model, kind, "b", seed=2, size=1).freeze()
    exprs, rows = ["a", None, "b"], tiny.rows(6, 4, 5)
    batch = {k: v for k, v in tiny.batch(decoder, rows, "left").items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    activate(model, exprs)
    greedy = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), greedy)
    beams = model.generate(**batch, **options, num_beams=2)
    assert torch.equal(model.generate(**batch, **options, num_beams=2, use_cache=False), beams)
    for i, (expr, row) in enumerate(zip(exprs, rows, strict=True)):
        activate(model, expr)
        one = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        assert torch.equal(model.generate(**one, **options)[0, -4:], greedy[i, -4:])
        assert torch.equal(model.generate(**one, **options, num_beams=2)[0, -4:], beams[i, -4:])
