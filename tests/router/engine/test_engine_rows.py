"""One batch of any mixture equals each row alone; heads differ by row; residency changes nothing but memory."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import compose
from hub.errors import HubError, UsageError
from router.engine.engine import Engine
from router.engine.request import Request
from router.ensemble.demix import Ensemble

BASE = "builtin:tiny-lm"


def same(one, other) -> bool:
    close = all(n == m and abs(p - q) < 1e-4 for (n, p), (m, q) in zip(one.scores, other.scores, strict=True))
    return (one.text, one.finish, one.label) == (other.text, other.finish, other.label) and close


@pytest.fixture(scope="module")
def rows():
    texts = ("The parties agree", "def main(", "It was a dark night and the old man said", "To be", "For all of us")
    adapters = (
        None,
        "law",
        "code",
        "0.5 * law + code",
        "mood",
        "tone",
        "topic",
        "lead",
        "law >> mood",
        "ties(law, law)",
    )
    return [
        Request(text=texts[i % 5] + " of" * (i % 3), adapter=adapters[i % 10], max_new_tokens=3 + i % 5, scores=2)
        for i in range(30)
    ]


def test_a_mixed_batch_equals_each_row_alone(engine, rows):
    together = engine.run(rows)
    alone = [engine.run([row])[0] for row in rows]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert {r.label is None for r in together} == {True, False}
    assert len({r.text for r in together}) > 5


def test_the_order_and_the_size_of_batches_do_not_matter(engine, rows, published):
    small = Engine(BASE, store=published.store, dtype="fp32", rows=3)
    turned = small.run(rows[::-1])[::-1]
    small.close()
    assert all(same(a, b) for a, b in zip(engine.run(rows), turned, strict=True))


def test_greedy_decoding_is_what_transformers_generates(engine):
    text, ids = "The parties agree", engine.host.tokenizer("The parties agree", return_tensors="pt")
    for adapter in (None, "law", "lead", "0.5 * law + tone"):
        answer = engine.run([Request(text=text, adapter=adapter, max_new_tokens=8)])[0]
        with engine.residency.in_use(engine.needed([engine.prepare(Request(text=text, adapter=adapter))])):
            engine.host.activate([engine.targets.get(adapter).expr])
            made = engine.host.model.generate(**ids, max_new_tokens=8, do_sample=False)
        told = engine.host.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.text == told


@pytest.mark.parametrize(("name", "classes"), [("mood", 2), ("topic", 3)])
def test_a_head_answers_as_on_a_classification_model(engine, published, name, classes):
    model, ids = published.model(classes), engine.host.tokenizer("To be or not", return_tensors="pt")
    compose.attach(model, name, published.store.get(f"local/{name}"))
    compose.activate(model, name)
    with torch.no_grad():
        wanted = model(**ids).logits[0].softmax(-1)
    compose.activate(model, None)
    compose.detach(model, name)
    found = dict(engine.run([Request(text="To be or not", adapter=name, scores=classes)])[0].scores)
    labels = published.store.get(f"local/{name}").manifest.labels
    assert [found[label] for label in labels] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(engine):
    wanted = [
        Request(text="To be", adapter="law", temperature=1.0, top_p=0.9, seed=s, max_new_tokens=6) for s in range(5)
    ]
    together = [r.text for r in engine.run(wanted)]
    assert together == [engine.run([r])[0].text for r in wanted]
    assert len(set(together)) > 2


def test_stop_texts_and_counts(engine):
    plain = engine.run([Request(text="The parties agree", adapter="law", max_new_tokens=12)])[0]
    word = plain.text[len(plain.text) // 2 :][:3]
    cut = engine.run([Request(text="The parties agree", adapter="law", max_new_tokens=12, stop=(word,))])[0]
    assert cut.text == plain.text[: plain.text.index(word)]
    assert cut.finish == "stop"
    assert 0 < cut.written <= plain.written
    assert cut.read == len(engine.host.tokenizer("The parties agree")["input_ids"])


def test_scores_of_tokens_are_log_probabilities(engine):
    answer = engine.run([Request(text="The parties agree", max_new_tokens=4, scores=3)])[0]
    assert len(answer.tokens) == 4
    for token in answer.tokens:
        assert token.best[0] == (token.text, pytest.approx(token.log_prob))
        assert 0 >= token.best[0][1] >= token.best[1][1] >= token.best[2][1]


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("lwa", "law"),
        ("mood + topic", "different labels"),
        ("0.5 * ensemble.demix(law, code)", "outermost"),
        ('ensemble.demix(law, code, prior="updating")', "rows before"),
        ("ensemble.mean(mood, law)", "classify"),
        ("0.5 *", "something is missing here"),
    ],
)
def test_a_row_that_cannot_run_says_why_and_leaves_the_others_alone(engine, adapter, words):
    good = Request(text="To be", adapter="law", max_new_tokens=2)
    bad, fine = engine.run([Request(text="To be", adapter=adapter), good], strict=False)
    assert isinstance(bad, HubError)
    assert words in f"{bad.message} {bad.hint}"
    assert same(fine, engine.run([good])[0])


def test_an_ensemble_is_answered_beside_other_rows(engine):
    text, expr = "The parties agree", "ensemble.demix(law, code, gamma=0.9)"
    asked = [
        Request(text=text, adapter=expr, max_new_tokens=6, weights=True),
        Request(text="To be", adapter="law", max_new_tokens=3),
        Request(text="def main(", adapter=expr, max_new_tokens=4),
    ]
    answers = engine.run(asked)
    assert all(same(a, engine.run([r])[0]) for a, r in zip(answers, asked, strict=True))
    ids = engine.host.tokenizer(text, return_tensors="pt")["input_ids"]
    experts = ["local/law@1.0.0", "local/code@1.0.0"]
    made = Ensemble(engine.host.model, experts, gamma=0.9).generate(ids, max_new_tokens=6, do_sample=False)
    assert answers[0].text == engine.host.tokenizer.decode(made.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    assert list(answers[0].weights.values()) == pytest.approx(made.posterior[0, 0].tolist(), abs=1e-4)


def test_an_ensemble_samples_scores_streams_and_stops_like_other_rows(engine):
    asked = [
        Request(
            text="The parties agree",
            adapter="ensemble.demix(law, code)",
            max_new_tokens=8,
            temperature=1.0,
            top_p=0.9,
            seed=seed,
            scores=2,
        )
        for seed in range(4)
    ]
    answers = engine.run(asked)
    assert all(same(a, engine.run([r])[0]) for a, r in zip(answers, asked, strict=True))
    assert len({a.text for a in answers}) > 1
    model = engine.host.model
    ids = engine.host.tokenizer("The parties agree", return_tensors="pt")["input_ids"]
    said = engine.host.tokenizer(answers[0].text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    score = Ensemble(model, ["local/law@1.0.0", "local/code@1.0.0"]).score(torch.cat([ids, said], 1))
    assert answers[0].tokens[0].log_prob == pytest.approx(float(score.log_probs[0, ids.shape[1] - 1]), abs=1e-4)
    pieces = []
    ended = threading.Event()
    job = engine.submit(
        Request(text="To be", adapter="ensemble.mean(law, tone)", max_new_tokens=400),
        lambda _: ended.set(),
        pieces.append,
    )
    while not pieces:
        assert not ended.wait(0.01)
    engine.cancel(job)
    assert engine.run([Request(text="To be", adapter="law", max_new_tokens=1)])[0].written == 1
    assert not ended.is_set()
    stop = answers[0].text[4:7]
    cut = engine.run([replace(asked[0], stop=(stop,))])[0]
    assert cut.finish == "stop"
    assert cut.text == answers[0].text[: answers[0].text.index(stop)]


def test_texts_that_do_not_fit(engine):
    long = "word " * 2000
    with pytest.raises(HubError, match="are more than the 512"):
        engine.run([Request(text=long)])
    assert engine.run([Request(text=long, adapter="mood")])[0].read == 512  # a text to classify is cut
    with pytest.raises(UsageError, match="temperature"):
        Request(text="x", temperature=float("nan"))


def test_two_hundred_adapters_through_a_residency_of_eight(published, tmp_path):
    places, model = {f"n{i}": tmp_path / f"n{i}" for i in range(200)}, published.model(None)
    adapter = compose.create(model, "ia3", name="n")
    generator = torch.Generator().manual_seed(0)
    for place in places.values():
        for parameter in adapter.parameters():
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=generator)
        compose.save(adapter, place, model=model, task="causal_lm")
    compose.detach(model, "n")
    requests = [Request(text="It was a dark", adapter=name, max_new_tokens=3) for name in places]
    roomy = Engine(BASE, adapters=places, dtype="fp32", rows=1)
    alone = [r.text for r in roomy.run(requests)]
    assert len(roomy.residency.resident) == 200
    budget = 8 * max(roomy.sources.known(name).bytes for name in places)
    tight = Engine(BASE, adapters=places, dtype="fp32", rows=16, resident=budget)
    assert [r.text for r in tight.run(requests)] == alone
    assert len(set(alone)) > 10
    assert tight.residency.bytes <= budget
    assert tight.residency.counts.evicted == 200 - len(tight.residency.resident)
    assert tight.residency.counts.ahead > 100  # read while others were computed
    assert [r.text for r in tight.run(requests[:20])] == alone[:20]  # read again
    roomy.close()
    tight.close()


def test_what_is_dropped_while_it_is_used_goes_afterwards(engine):
    known = engine.sources.known("local/tone")
    held = engine.residency
    with held.in_use([known]):
        held.drop(known.name)
        assert known.name in held.resident
    assert known.name not in held.resident
    assert known.name not in engine.host.runtime.adapters


def test_an_adapter_with_a_vocabulary_of_its_own_is_no_row_among_others(published, tmp_path):
    model = compose.load(BASE, dtype="fp32")
    adapter = compose.create(model, "lora", {"r": 2, "modules_to_save": ("embed_tokens",)}, name="wide")
    tensors = {k: v.clone() for k, v in adapter.state().items()}
    key = next(k for k in tensors if k.endswith("embed_tokens.weight"))
    tensors[key] = torch.cat([tensors[key], tensors[key][:3]])
    adapter.load_state(tensors)
    compose.save(adapter, tmp_path / "wide", model=model)
    engine = Engine(BASE, store=published.store, adapters={"wide": tmp_path / "wide"}, dtype="fp32")
    with pytest.raises(UsageError, match="has a vocabulary of its own, of 4099 tokens"):
        engine.targets.get("wide")
    engine.close()
