"""Pairs: how well the second text is borne out by the first."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from hub.errors import HubError
from hub.store import Store
from train.errors import DataError
from train.fewshot.classifier.classifier import FewShotClassifier
from train.fewshot.examples import Example
from train.fewshot.job import learn
from train.fewshot.reading.match import agreement, match, pairs
from train.fewshot.reading.reader import MaskReader
from train.fewshot.reading.views import View
from train.fewshot.run import Request, publish

pytestmark = pytest.mark.filterwarnings("ignore")


def pairs_of(n: int, seed: int) -> tuple[Example, ...]:
    """Half of the second texts are the beginning of the first, half are of other words."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        words = draw.sample([f"w{j}" for j in range(20)], 12)
        second = words[:3] if i % 2 else words[6:9]
        rows.append(Example(" ".join(words[:6]), " ".join(second), ("other", "same")[i % 2]))
    return tuple(rows)


def test_agreement_by_hand():
    first = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    second = torch.tensor([[0.0, 3.0], [-1.0, 0.0]])
    found = agreement(first, second)
    half = 0.5**0.5
    means = F.cosine_similarity(torch.tensor([1.0, 2 / 3]), torch.tensor([-0.5, 1.5]), dim=0).item()
    # columns of the cosines: (0, 1, half) and (-1, 0, -half); rows: 0, 1, half
    assert found.tolist() == pytest.approx([means, (1 + 0) / 2, (0 + 1 + half) / 3, 0.0], abs=1e-6)
    assert agreement(first, torch.zeros(0, 2)).tolist() == [0, 0, 0, 0]


def test_pairs_are_read_apart_and_without_what_the_tokenizer_adds(make_job):
    job = make_job()
    reader = MaskReader(job.model)
    options = {"max_length": 32}
    texts = [("the good film", "a plot"), ("w1", "the good film w2 w3 w4"), ("", "a plot")]
    whole = match(reader, texts, job.tokenizer, **options)
    alone = torch.cat([match(reader, [pair], job.tokenizer, **options) for pair in texts])
    torch.testing.assert_close(whole, alone)
    ids = [job.tokenizer(text, return_tensors="pt") for text in texts[1]]
    with torch.no_grad():
        states = [job.model(**i, output_hidden_states=True).hidden_states[-1][0, 1:-1] for i in ids]
    reader.close()
    torch.testing.assert_close(whole[1], agreement(*states))
    assert whole[2].tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match="'w1' has no second text"):
        pairs([Example("a", "b"), Example("w1")])


@pytest.mark.parametrize("method", ["feature", "auto"])
def test_a_pair_is_judged_by_what_its_texts_share(make_job, masked_base, tmp_path, method):
    from hub.ref import AdapterRef
    from train.fewshot.examples import Columns

    job = make_job(
        examples=pairs_of(24, 0), labels=("other", "same"), words={}, budget=1000.0 if method == "auto" else 1
    )
    learned = learn(job, method)
    asked = pairs_of(60, 1)
    said = learned.classifier.logits(asked)
    right = torch.tensor([("other", "same").index(str(e.label)) for e in asked])
    assert (said.argmax(1) == right).double().mean() >= 0.85
    assert learned.facts["shares"]["match"] > 0.3
    (tmp_path / "pairs.jsonl").write_text("{}")
    request = Request(str(tmp_path / "pairs.jsonl"), masked_base, Columns("text", "text2"), method=method)
    made = publish(learned, request, AdapterRef.parse("me/pairs@0.1.0"), {}, Store(tmp_path / "home"))
    again = FewShotClassifier.load(made)
    assert torch.equal(again.logits(asked), said)
    with pytest.raises(HubError, match="text") as error:
        again.logits([Example("a plot")])
    assert "--text2" in str(error.value.hint)


def test_views_keep_their_order(make_job):
    job = make_job(examples=pairs_of(4, 0), labels=("other", "same"))
    found = job.features([View(None, "match"), View(), View(None, "match")])
    assert [s.shape[1] for s in found.states] == [4, 32, 4]
    assert torch.equal(found.states[0], found.states[2])
