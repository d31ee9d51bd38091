"""What a classifier is made of: members, their shares, the adapter they read, and how both are chosen."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save

import compose
from hub.pack import pack
from hub.store import Store
from train.errors import DataError
from train.fewshot.classifier.classifier import FewShotClassifier, head_member
from train.fewshot.classifier.members import Demonstrations
from train.fewshot.classifier.spec import FACTS, HEAD, Spec
from train.fewshot.examples import Example
from train.fewshot.job import learn
from train.fewshot.prompts.filled import prompt_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.reading.head import Head, words_alone
from train.fewshot.reading.reader import PromptModel
from train.fewshot.reading.views import View
from train.fewshot.recipes.adapt import adapt, contrast
from train.fewshot.recipes.auto import stack
from train.fewshot.run import Request, publish
from train.fewshot.tuning.prompt_tuning import tune, tune_many
from train.seeds import generator

pytestmark = pytest.mark.filterwarnings("ignore")

# -- shares ----------------------------------------------------------------------------------------------------------


def test_shares_are_at_the_maximum_of_the_posterior():
    random = generator(0, "held")
    answers = torch.arange(20) % 3
    right = F.one_hot(answers, 3)
    held = torch.stack(
        [(scale * right + torch.randn(20, 3, generator=random)).log_softmax(-1) for scale in (2, 0.5, 0)]
    )
    belief = torch.tensor([1.0, 1.0, 6.0])

    def posterior(w: torch.Tensor, b: torch.Tensor) -> float:
        mixed = torch.einsum("m,mnc->nc", w, held).log_softmax(-1)
        return float(-F.nll_loss(mixed, answers, reduction="sum") + b @ w.log())

    plain, believed = stack(held, answers), stack(held, answers, belief)
    assert plain.sum().item() == pytest.approx(1) and plain[0] > plain[1] > plain[2] > 0 and believed[2] > plain[2]
    for shares, b in ((plain, torch.ones(3)), (believed, belief)):
        best = posterior(shares, b)
        for _ in range(200):
            other = (shares.log() + 0.2 * torch.randn(3, generator=random)).softmax(0)
            assert posterior(other, b) <= best + 1e-3


def test_equal_members_get_equal_shares():
    held = torch.randn(1, 9, 4, generator=generator(1)).log_softmax(-1).repeat(3, 1, 1)
    torch.testing.assert_close(stack(held, torch.arange(9) % 4), torch.full((3,), 1 / 3))


def test_a_mixture_is_the_weighted_mean_of_log_probabilities(make_job, reviews_of):
    job = make_job()
    job.identity()
    parts = [
        head_member([View(job.patterns[0], "mask")], words_alone(2), job.spoken, adapted=False),
        head_member([View()], Head((torch.randn(32, 2, generator=generator(2)),), torch.zeros(2), 0.0), ()),
    ]
    apart = [job.classifier(part).logits(reviews_of(5)).log_softmax(-1) for part in parts]
    both = job.classifier(*parts, shares=[0.3, 0.7]).logits(reviews_of(5))
    torch.testing.assert_close(both, 0.3 * apart[0] + 0.7 * apart[1])


# -- adapting --------------------------------------------------------------------------------------------------------


def test_contrast_by_hand():
    states = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), dim=-1)
    half = 0.5**0.5
    p01 = torch.tensor([half, 0.0]).log_softmax(0)[0]  # row 0 among rows 1 and 2; row 1 likes both alike
    wanted = -(p01 + torch.tensor([half, half]).log_softmax(0)[0])
    torch.testing.assert_close(contrast(states, torch.tensor([0, 0, 1]), tau=1.0), wanted)
    assert contrast(states, torch.tensor([0, 1, 2])).item() == 0  # nobody has another of its label


def test_adapting_learns_the_words_and_the_contrast(make_job, reviews_of):
    job = make_job(examples=tuple(reviews_of(16)))

    def surprise() -> float:
        words = job.features([View(t, "mask") for t in job.patterns]).prior.mean(1)
        return float(F.cross_entropy(words, job.answers))

    job.identity("none")
    before = surprise()
    both = adapt(job, range(16), job.verbalizer().single(job.tokenizer), name="a", steps=30)
    assert both.result.stopped == "finished" and not both.adapter.trainable
    assert surprise() < 0.97 * before
    alone = adapt(job, range(16), None, name="b", steps=1)  # the first step: no weight has changed
    gap = both.result.history[0]["loss"] - alone.result.history[0]["loss"]
    assert (
        alone.result.stopped == "finished" and alone.result.history[0]["loss"] > 0 and 0.3 < gap < 0.9
    )  # the words' CE


def test_adapters_of_one_pass_are_those_of_their_own_runs(make_job, reviews_of):
    """Templates with and without token types, several sets of rows: dropout is off, so both ways agree."""
    job = make_job()
    for module in job.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    scores = job.verbalizer().single(job.tokenizer)
    templates = ("{text} it was {mask}.", "{mask} ? {sep} {text}")
    sets = [
        prompt_dataset(Template.parse(t), reviews_of(8, 8 * i), job.tokenizer, job.labels)
        for i, t in enumerate(templates)
    ]
    assert ["token_type_ids" in data.columns for data in sets] == [False, True]
    configs = [job.config(4, seed=seed, batch=4, precision="fp32") for seed in (1, 2)]
    together = tune_many(job.model, scores, sets, configs, names=("a", "b"))
    for data, config, adapter in zip(sets, configs, together, strict=True):
        alone = tune(job.model, lambda reader: PromptModel(reader, scores), data, config, name=f"alone{config.seed}")
        for name, value in alone.adapter.state_dict().items():
            torch.testing.assert_close(adapter.state_dict()[name], value, rtol=1e-3, atol=1e-5)
        compose.activate(job.model, None)


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "lm-bff-demo", "pet"])
def test_an_artifact_reads_as_its_training_did(make_job, review_file, masked_base, reviews_of, tmp_path, method):
    job = make_job(examples=tuple(reviews_of(24 if method == "auto" else 8)))
    learned = learn(job, method)
    asked = reviews_of(5, 60)
    before = learned.classifier.logits(asked)
    store = Store(tmp_path / "home")
    from hub.ref import AdapterRef
    from train.fewshot.examples import Columns

    request = Request(review_file(), masked_base, Columns(), method=method)
    artifact = publish(learned, request, AdapterRef.parse("me/reviews@0.1.0"), {}, store)
    assert not store.verify(artifact.ref)
    again = FewShotClassifier.load(artifact)
    assert torch.equal(again.logits(asked), before)
    torch.testing.assert_close(torch.cat([again.logits([e]) for e in asked]), before, rtol=0.02, atol=0.02)
    kinds = [member.kind for member in again.spec.members]
    assert kinds == ["demonstrations"] if method == "lm-bff-demo" else set(kinds) == {"views"}
    if method == "auto":
        assert set(learned.facts["shares"]) == {"frozen", "names", "words", "contrast"}
        assert [m.adapted for m in again.spec.members] == [False, False, True, True]


def test_what_is_drawn_for_a_text_does_not_depend_on_its_company(make_job, reviews_of):
    job = make_job()
    rows = tuple((e.text, None, str(e.label)) for e in reviews_of(12))
    member = Demonstrations(
        template=job.patterns[0], words=job.spoken, said=("terrible", "great"), rows=rows, samples=2, seed=5
    )
    job.identity()
    queries = [Example("the good film"), Example("a bad plot"), Example(rows[0][0])]
    whole = member.prompts(job.reading, queries, 2)
    alone = member.prompts(job.reading, queries[1:2], 2)
    assert [whole.tokens.row(i).tolist() for i in (2, 3)] == [alone.tokens.row(i).tolist() for i in (0, 1)]


def _facts(**changes) -> dict:
    member = {"kind": "views", "views": [[None, "mean"]]}
    return {"base": "b", "labels": ["x", "y"], "members": [member], "shares": [1.0], "max_length": 8, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"shares": [0.5]},
        {"shares": [0.5, 0.5]},
        {"members": []},
        {"members": [{"kind": "views", "views": [[None, "mean"]], "words": [[1]]}]},
        {"members": [{"kind": "views", "views": [[None, "mean"]], "words": [[1], [-2]]}]},
        {"members": [{"kind": "other"}]},
        {"labels": ["x"]},
    ],
)
def test_facts_that_do_not_fit_are_refused(changes):
    assert Spec.model_validate(_facts()).members[0].adapted
    with pytest.raises(ValidationError):
        Spec.model_validate(_facts(**changes))


@pytest.mark.parametrize(("file", "content", "said"), [
    (FACTS, b"{}", "malformed"),
    (FACTS, json.dumps(_facts(labels=["x", "y", "z"])).encode(), "does not fit 3 labels"),
    (HEAD, save({"0.offset": torch.zeros(3)}), "does not fit 2 labels"),
])  # fmt: skip
def test_files_that_do_not_fit_are_named(make_job, review_file, masked_base, tmp_path, file, content, said):
    from hub.manifest import Draft
    from hub.ref import AdapterRef
    from train.fewshot.examples import Columns

    store, job = Store(tmp_path / "home"), make_job()
    learned = learn(job, "feature")
    made = publish(learned, Request(review_file(), masked_base, Columns()), AdapterRef.parse("me/a@0.1.0"), {}, store)
    folder = tmp_path / "changed"
    for name in made.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(made.file(name).read_bytes())
    (folder / file).write_bytes(content)
    facts = made.manifest.model_dump()
    draft = Draft.model_validate({n: facts[n] for n in Draft.model_fields if n in facts} | {"name": "me/b"})
    pack(folder, draft)
    with pytest.raises(DataError, match=said) as error:
        FewShotClassifier.load(store.put(folder))
    assert "hub verify" in str(error.value.hint)
