"""Encoders that were saved without a language-modelling head: nothing is read that chance has drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compose.base.model import drawn_tensors
from hub.errors import UsageError
from hub.store import Store
from train.fewshot.classifier.classifier import FewShotClassifier, load_base
from train.fewshot.examples import Columns
from train.fewshot.job import learn
from train.fewshot.reading.reader import usable_positions
from train.fewshot.recipes.readings import NEARNESS, BareReadings
from train.fewshot.run import Request, run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def headless_base(masked_base, tmp_path_factory):
    """The same encoder, saved as transformers saves a bare one."""
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("headless")
    AutoModel.from_pretrained(masked_base).save_pretrained(folder)
    for file in Path(masked_base).glob("tokenizer*"):
        shutil.copy(file, folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    return str(folder)


@pytest.fixture
def headless_job(make_job, headless_base):
    def make(**changes):
        return make_job(model=load_base(headless_base), base=headless_base, **changes)

    return make


def test_a_head_that_was_drawn_is_told_from_one_that_was_learned(headless_base, masked_base):
    assert drawn_tensors(load_base(masked_base)) == ()
    assert all(name.startswith("cls.") for name in drawn_tensors(load_base(headless_base)))
    assert type(load_base(headless_base)).__name__ == "BertForMaskedLM"


def test_no_mask_is_read_without_a_head(headless_job, reviews_of):
    job = headless_job(examples=tuple(reviews_of(32)))
    assert job.encoder and not job.masked and not job.patterns and not job.spoken
    learned = learn(job, "auto")
    shown = {view.template for member in learned.classifier.spec.members for view in member.shown()}
    assert shown == {None} and set(learned.facts["shares"]) <= {"frozen", "contrast"}
    assert not any(member.words for member in learned.classifier.spec.members)
    guess = learned.classifier.logits(job.examples).argmax(1)
    assert (guess == job.answers).double().mean() >= 0.8
    for method in ("zero-shot", "lm-bff", "pet", "multi-mask"):
        with pytest.raises(UsageError, match="saved without a language-modelling head"):
            learn(headless_job(), method)


def test_names_that_are_read_as_texts_are_folded_into_the_head(headless_job, reviews_of):
    """Names of labels that are among the texts' words help, and cost nothing at prediction."""
    job = headless_job(examples=tuple(reviews_of(8)), words={"pos": ("good", "fine"), "neg": ("bad", "poor")})
    bare = BareReadings.read(job)
    reading, (member, tensors) = bare["frozen"], bare.members(job)["frozen"]
    assert member.strength == 0 and reading.choice.head.strength > 0
    torch.testing.assert_close(
        reading.features.prior[:, 0], NEARNESS * reading.features.states[0] @ reading.names.states.T
    )
    job.identity()
    torch.testing.assert_close(
        member.logits(job.reading, job.examples, tensors), reading.choice.head(reading.features), rtol=1e-3, atol=1e-3
    )


def test_a_headless_classifier_is_published_and_read_again(review_file, headless_base, reviews_of, tmp_path):
    store = Store(tmp_path / "home")
    request = Request(review_file(), headless_base, Columns(), k=8, publish="me/bare", max_length=32)
    made = run(request, store=store)
    again = FewShotClassifier.load("me/bare", store=store)
    asked = reviews_of(6, 50)
    torch.testing.assert_close(again.logits(asked), made.classifier.logits(asked))


def test_robertas_positions_begin_behind_its_padding():
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForMaskedLM(RobertaConfig(vocab_size=20, max_position_embeddings=34, pad_token_id=1, **sizes))
    assert usable_positions(roberta) == 32
    roberta(input_ids=torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 33), 5))
    bert = BertForMaskedLM(BertConfig(vocab_size=20, max_position_embeddings=34, pad_token_id=0, **sizes))
    assert usable_positions(bert) == 34


def test_without_a_test_file_all_labels_are_measured(tmp_path, masked_base, monkeypatch):
    """Noise is measured as noise: rows of the first label alone would make it look right or wrong."""
    from train.fewshot import run as module

    seen = []
    monkeypatch.setattr(module, "_MOST_TEST", 20)
    monkeypatch.setattr(module, "measure", lambda _classifier, test: seen.extend(test) or {})
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"w{i % 20} w{i // 20} film {a}", "label": a} for a in ("bad", "good") for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = run(Request(str(path), masked_base, Columns(), k=4, method="feature")).facts
    assert sorted(e.label for e in seen) == ["bad"] * 10 + ["good"] * 10
    assert facts["labels_not_measured"] == 0 and facts["contradictory_rows"] == 0 and facts["cut_rows"] == 0
