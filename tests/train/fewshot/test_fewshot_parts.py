"""Parts of the methods against hand-computed values: stages, replay, heads, PET, iPET, masks, demonstrations, words."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import compose
from train.errors import TrainError
from train.fewshot.examples import Example
from train.fewshot.prompts.demonstrations import candidates, choose, demonstrated
from train.fewshot.prompts.filled import encode, prompt_dataset
from train.fewshot.prompts.template import Template
from train.fewshot.prompts.verbalizer import Verbalizer
from train.fewshot.reading.head import PENALTIES, average, choose_head, fit_head, words_alone
from train.fewshot.reading.masks import decode, hinge, sequence_ce
from train.fewshot.reading.reader import MaskReader, PromptModel, inputs_of
from train.fewshot.reading.replay import Replay
from train.fewshot.reading.views import Features, view_dataset
from train.fewshot.reading.weighing import Weighing, cooled
from train.fewshot.recipes import ipet
from train.fewshot.recipes.label_words import assignments, candidate_words
from train.fewshot.recipes.pet import ensemble_mean
from train.fewshot.recipes.stages import Pipeline, Stage
from train.fewshot.splits import folds
from train.fewshot.tuning.distil import Distillation
from train.fewshot.tuning.prompt_tuning import WithLM, mask_tokens
from train.seeds import generator


def random_of(*where):
    return generator(0, *where)


# -- stages ----------------------------------------------------------------------------------------------------------


def test_stages_resume_and_remake_only_what_a_changed_fact_reaches(tmp_path):
    ran: list[str] = []

    def pipeline(fact: int) -> Pipeline:
        def make(name, value):
            def run(needs):
                ran.append(name)
                return {"x": sum((n["x"] for n in needs.values()), torch.tensor([float(value)]))}

            return run

        made = Pipeline(tmp_path)
        made.add(Stage("a", {}, (), make("a", 1)))
        made.add(Stage("b", {"fact": fact}, (), make("b", fact)))
        made.add(Stage("c", {}, ("a", "b"), make("c", 0)))
        return made

    assert pipeline(2).run()["c"]["x"].item() == 3 and ran == ["a", "b", "c"]
    assert pipeline(2).run()["c"]["x"].item() == 3 and ran == ["a", "b", "c"]  # all kept
    assert pipeline(5).run("c")["c"]["x"].item() == 6 and ran[3:] == ["b", "c"]  # a is kept
    torn = tmp_path / f"{pipeline(5).key('c')[:32]}.safetensors"
    torn.write_bytes(torn.read_bytes()[:9])
    assert pipeline(5).run()["c"]["x"].item() == 6 and ran[5:] == ["c"]


def test_a_stage_that_is_not_there_is_refused():
    with pytest.raises(TrainError, match="needs b"):
        Pipeline().add(Stage("a", {}, ("b",), lambda _: {}))


# -- replay ----------------------------------------------------------------------------------------------------------


def test_replayed_lower_blocks_give_equal_logits_and_gradients(make_job, reviews_of):
    job = make_job()
    data = prompt_dataset(Template.parse("{text} is {mask}."), reviews_of(6), job.tokenizer, job.labels)
    scores = job.verbalizer().single(job.tokenizer)
    replay = Replay(job.model, 2)
    reader = MaskReader(job.model, replay)
    adapter = compose.create(
        job.model, "lora", {"r": 2, "target_modules": "all-linear", "layers": (2,)}, name="a", seed=1
    )
    kept = replay.record(data, lambda batch: reader(**inputs_of(batch)))
    compose.activate(job.model, "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3, generator=random_of("p"))
    model = PromptModel(reader, scores).eval()
    rows = torch.tensor([4, 0, 3])
    batch = {n: v for n, v in data.batch(rows).items() if n != "labels"}

    def gradients(**more):
        adapter.zero_grad()
        logits = model(**batch, **more).logits
        logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in adapter.parameters()]

    plain, plain_grads = gradients()
    with replay.on():
        assert sum(p.numel() for p in job.model.base_model.encoder.layer[0].parameters()) == 0  # it stands aside
        fast, fast_grads = gradients(row=kept[rows])
    torch.testing.assert_close(fast, plain)
    for one, other in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients()[0], plain)  # the real blocks are back
    reader.close()


def test_masks_alone_reach_the_vocabulary(make_job, reviews_of):
    job = make_job()
    data = prompt_dataset(Template.parse("{text} is {mask}."), reviews_of(3), job.tokenizer, job.labels)
    batch = inputs_of(data.batch(torch.arange(3)))
    reader = MaskReader(job.model).eval()
    with torch.no_grad():
        ours = reader(**batch).logits
        reader.close()
        at = batch.pop("mask_at")
        whole = job.model(**batch).logits
    assert ours.shape == (3, 1, whole.shape[-1])
    torch.testing.assert_close(ours[:, 0], whole[torch.arange(3), at[:, 0]])


# -- heads -----------------------------------------------------------------------------------------------------------


def views_of(n: int, seed: int = 0, classes: int = 3) -> tuple[Features, torch.Tensor]:
    random = random_of("views", seed)
    labels = torch.arange(n) % classes
    states = F.normalize(torch.randn(n, 12, generator=random) + 2 * F.one_hot(labels, 12), dim=-1)
    prior = torch.randn(n, 2, classes, generator=random) + F.one_hot(labels, classes)[:, None]
    return Features((states, F.normalize(torch.randn(n, 20, generator=random), dim=-1)), prior), labels


def test_the_head_is_at_the_minimum_of_its_objective():
    features, labels = views_of(18)
    head = fit_head(features, labels, 3, 2.0)
    # gradient of the objective at the solution, in the original coordinates (features are scaled by 4 and centred)
    x = torch.cat(features.states, 1) * 4
    error = head(features).softmax(-1) - F.one_hot(labels, 3)
    weight = torch.cat(head.weights) / 4
    torch.testing.assert_close((x - x.mean(0)).T @ error, -2.0 * weight, rtol=0, atol=2e-2)
    torch.testing.assert_close(error.sum(0), torch.zeros(3), rtol=0, atol=2e-2)
    words = features.prior.mean(1) - features.prior.mean(1).mean(0)
    assert (error * words).sum().item() == pytest.approx(-3 * (head.strength - 1), abs=2e-2)


def test_a_strong_penalty_leaves_the_words_alone_to_answer():
    features, labels = views_of(12)
    strong = fit_head(features, labels, 3, 1e6)
    assert max(w.abs().max() for w in strong.weights) < 1e-3
    centred = features.prior.mean(1) * strong.strength
    torch.testing.assert_close(strong(features) - strong.offset, centred, rtol=1e-3, atol=1e-2)
    assert fit_head(features, labels, 3, 1.0, prior=False).strength == 0
    torch.testing.assert_close(words_alone(3)(features), features.prior.mean(1))


def test_an_average_of_heads_has_the_average_of_their_logits():
    features, labels = views_of(12)
    heads = [fit_head(features, labels, 3, penalty) for penalty in PENALTIES[:2]]
    joint = average(heads, [0.25, 0.75])(features)
    torch.testing.assert_close(joint, 0.25 * heads[0](features) + 0.75 * heads[1](features))
    examples = [Example(str(i), None, str(int(c))) for i, c in enumerate(labels)]
    parts = folds(examples, 3, 0)
    choice = choose_head(features, labels, 3, parts)
    assert choice.seen.all() and 0.5 < choice.accuracy(labels) <= 1
    assert (choice.head(features).argmax(1) == labels).all()
    few = choose_head(features, labels, 3, parts[:1])
    assert few.seen.nonzero()[:, 0].tolist() == sorted(parts[0]) and few.head.offset.isfinite().all()


def test_of_noise_nothing_is_said_to_be_learned():
    """Five penalties, three kinds of head, each with its scale: told of the rows that chose them, they would shine."""
    told = []
    for seed in range(8):
        random = random_of("noise", seed)
        states = F.normalize(torch.randn(24, 12, generator=random), dim=-1)
        features, labels = Features((states,), torch.randn(24, 1, 2, generator=random)), torch.arange(24) % 2
        parts = folds([Example(str(i), None, str(int(c))) for i, c in enumerate(labels)], 4, seed)
        told.append(choose_head(features, labels, 2, parts).accuracy(labels))
    assert sum(told) / len(told) < 0.56


def test_heads_are_cooled_to_what_held_out_rows_say():
    random = random_of("cool")
    labels = torch.arange(300) % 3
    right = torch.randn(300, 3, generator=random) + 1.5 * F.one_hot(labels, 3)
    assert cooled(4 * right, labels) == pytest.approx(cooled(right, labels) / 4, rel=0.1)
    assert cooled(right, labels) == pytest.approx(1.5, rel=0.25)  # the log odds of unit noise around steps of 1.5


def test_a_head_that_is_too_sure_but_right_is_not_left_out():
    random = random_of("weigh")
    labels = torch.arange(200) % 2
    signal = torch.randn(200, 2, generator=random) + F.one_hot(labels, 2)
    noise = torch.randn(200, 2, generator=random)
    weighing = Weighing.of(torch.stack([30 * signal, noise]), None, torch.zeros(200, 2))
    weights = weighing.fit(labels, torch.arange(200))
    assert weights.share[0] > 0.99 and weights.scale[0] < 0.15


# -- PET -------------------------------------------------------------------------------------------------------------


def test_ensemble_mean_weights_sum_to_one_and_zero_weights_are_uniform():
    a, b = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 1.0]])
    assert torch.equal(ensemble_mean([a, b]), torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(ensemble_mean([a, b], [0.75, 0.25]), torch.tensor([[1.5, 4.0]]))
    torch.testing.assert_close(ensemble_mean([a, b], [3.0, 1.0]), torch.tensor([[1.5, 4.0]]))
    assert torch.equal(ensemble_mean([a, b], [0.0, 0.0]), torch.tensor([[2.0, 3.0]]))


def test_distillation_is_four_times_the_kl_at_two():
    class Fixed(torch.nn.Module):
        def forward(self, logits):
            from types import SimpleNamespace

            return SimpleNamespace(logits=logits)

    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    wanted = 4 * (p * (p / q).log()).sum()
    batch = {"logits": student, "soft": teacher, "labels": torch.tensor([0])}
    torch.testing.assert_close(Distillation().loss(Fixed(), batch, "classification"), wanted)


def test_masks_are_15_percent_80_10_10_and_spare_special_tokens(masked_tokenizer):
    ids = torch.randint(5, len(masked_tokenizer), (200, 60), generator=random_of("ids"))
    ids[:, 0], ids[:, -1] = masked_tokenizer.cls_token_id, masked_tokenizer.pad_token_id
    real = torch.ones_like(ids)
    real[:, -1] = 0
    masked, target = mask_tokens(ids, masked_tokenizer, random_of("mask"), real)
    chosen = target != -100
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    assert torch.equal(target[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    assert chosen[:, 1:-1].double().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (masked == masked_tokenizer.mask_token_id)[chosen].double().mean().item() == pytest.approx(0.8, abs=0.04)
    assert (masked == ids)[chosen].double().mean().item() == pytest.approx(0.1, abs=0.04)


def test_the_auxiliary_loss_mixes_in_masked_words(make_job, reviews_of):
    job = make_job()
    template, scores = Template.parse("{text} is {mask}."), job.verbalizer().single(job.tokenizer)
    data = prompt_dataset(template, reviews_of(4), job.tokenizer, job.labels)
    plain = view_dataset(None, reviews_of(8), job.tokenizer, job.labels, max_length=32)
    reader = MaskReader(job.model).eval()
    model = PromptModel(reader, scores)
    batch = data.batch(torch.arange(4))

    def loss(alpha: float) -> float:
        method = WithLM(reader, data=plain, tokenizer=job.tokenizer, alpha=alpha, seed=3)
        return method.loss(model, dict(batch), "classification").item()

    own = F.cross_entropy(model(**{n: v for n, v in batch.items() if n != "labels"}).logits, batch["labels"]).item() * 4
    assert loss(1.0) == pytest.approx(own, rel=1e-5)
    assert loss(0.25) == pytest.approx(0.25 * own + 0.75 * loss(0.0), rel=1e-5)
    assert loss(0.0) > 1  # of a random model: about log(vocabulary) a word, times four rows
    reader.close()


# -- iPET ------------------------------------------------------------------------------------------------------------


def test_growth_and_label_ratio():
    assert [ipet.growth(10, g) for g in range(3)] == [40, 240, 1240]
    assert ipet.quotas(["a"] * 3 + ["b"], 40) == {"a": 30, "b": 10}
    assert ipet.quotas(["a", "b", "c"], 10) == {"a": 4, "b": 3, "c": 3}
    assert sum(ipet.quotas(["a", "b", "b"], 7).values()) == 7


def test_others_label_for_a_model():
    for model in range(9):
        chosen = ipet.teachers(model, 9, random_of("t", model))
        assert len(chosen) == 2 == len(set(chosen)) and model not in chosen  # round(25% of 8)
    assert ipet.teachers(0, 2, random_of("t")) == [1]


def test_drawing_is_without_replacement_and_ends_when_a_label_is_never_predicted():
    logits = torch.tensor([[4.0, 0, 0], [3.0, 0, 0], [0, 2.0, 0], [5.0, 0, 0]])
    drawn = ipet.draw(logits, ("a", "b", "c"), {"a": 2, "b": 3, "c": 5}, random_of("d"))
    assert len(drawn) == 3 and len({row for row, _ in drawn}) == 3  # c: none is predicted so, b: there is one
    assert [label for _, label in drawn] == ["a", "a", "b"] and all(row != 2 for row, label in drawn if label == "a")
    counts = torch.zeros(4)
    sure = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 2.0, 0], [0.1, 0, 0]])
    for i in range(200):
        counts[ipet.draw(sure, ("a", "b", "c"), {"a": 1}, random_of("d", i))[0][0]] += 1
    assert counts[0] > counts[1] + counts[3]  # p = 1.0 against 0.36 each


def test_the_zero_shot_start_takes_the_most_likely_of_each_label():
    logits = torch.tensor([[4.0, 0], [3.0, 0], [0, 2.0], [2.0, 0]])
    assert ipet.most_likely(logits, ("a", "b"), 2) == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


# -- several masks ---------------------------------------------------------------------------------------------------


def test_hinge_by_hand():
    ce = torch.tensor([[1.0, 1.5, 4.0]])
    assert hinge(ce, torch.tensor([0])).item() == pytest.approx(0.5)  # max(0, 1+1-1.5) + max(0, 1+1-4)
    assert hinge(ce, torch.tensor([2])).item() == pytest.approx(4.0 + 3.5)


def test_sequence_ce_sums_over_tokens():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]]))
    ce = sequence_ce(logits, [[0], [1, 2]])
    torch.testing.assert_close(ce, -torch.log(torch.tensor([[0.5, 0.25 * 0.7]])))


@pytest.mark.parametrize("order", ["max-first", "ltr", "parallel"])
def test_decoding_a_batch_is_decoding_one_by_one(make_job, reviews_of, order):
    job, template = make_job(), Template.parse("{text} is {mask}.")
    words = [[9, 11], [10], [12, 13, 14], [15, 16]]
    reader = MaskReader(job.model)
    examples = reviews_of(3)
    together = decode(reader, template, examples, job.tokenizer, words, order=order)
    for i, c in itertools.product(range(3), range(4)):
        alone = _one(reader, job, template.with_masks(len(words[c])), examples[i], words[c], order)
        assert together[i, c].item() == pytest.approx(alone, abs=1e-4)
    reader.close()


def _one(reader, job, template, example, target, order):
    """The definition, for one example and one word: fill, look, fill."""
    row = encode(template, example, job.tokenizer)
    ids, open_, total = list(row.ids), list(range(len(target))), 0.0
    types = torch.tensor([row.types])
    for _ in range(len(target)):
        batch = {
            "input_ids": torch.tensor([ids]),
            "token_type_ids": types,
            "attention_mask": torch.ones(1, len(ids)).long(),
        }
        with torch.no_grad():
            log_p = reader(mask_at=torch.tensor([row.mask_at]), **batch).logits[0].log_softmax(-1)
        own = {j: log_p[j, target[j]].item() for j in open_}
        if order == "parallel":
            return sum(own.values())
        j = open_[0] if order == "ltr" else max(own, key=own.get)
        total += own[j]
        ids[row.mask_at[j]] = target[j]
        open_.remove(j)
    return total


def test_one_mask_is_the_single_mask_model(make_job, reviews_of):
    job, template = make_job(), Template.parse("{text} is {mask}.")
    scores = job.verbalizer().single(job.tokenizer)
    reader = MaskReader(job.model).eval()
    data = prompt_dataset(template, reviews_of(4), job.tokenizer, job.labels)
    single = PromptModel(reader, scores).eval()(**inputs_of(data.batch(torch.arange(4)))).logits.log_softmax(-1)
    many = decode(reader, template, reviews_of(4), job.tokenizer, [list(ids) for ids in scores.ids]).log_softmax(-1)
    torch.testing.assert_close(many, single.detach(), rtol=1e-4, atol=1e-5)
    reader.close()


# -- demonstrations and words ----------------------------------------------------------------------------------------


def test_a_demonstration_is_never_its_query_and_comes_from_the_likest_half(reviews_of):
    pool = [*reviews_of(16), Example("THE good w0  film w0", None, "pos")]  # the first text again, spelled otherwise
    likeness = torch.arange(17.0)
    for i, query in enumerate(pool):
        for draw in range(5):
            assert all(pool[j].key != query.key for j in choose(query, pool, random_of(i, draw)))
    near = candidates(pool[1], pool, likeness)
    assert near["neg"] == [15, 13, 11, 9] and near["pos"] == [16, 14, 12, 10, 8]
    assert len(choose(pool[1], pool, random_of("c"), likeness)) == 2


def test_demonstrations_follow_the_query_solved(masked_tokenizer):
    pool = [Example("good film", None, "pos"), Example("bad plot", None, "neg")]
    data = demonstrated(
        Template.parse("{text} is {mask}."), [Example("the film", None, "pos")], pool, {"pos": "great", "neg": "awful"},
        masked_tokenizer, ("neg", "pos"), samples=2, seed=0,
    )  # fmt: skip
    text = " ".join(masked_tokenizer.convert_ids_to_tokens(data.tokens.row(0).tolist()))
    assert text == "[CLS] the film is [MASK] . [SEP] bad plot is awful . [SEP] good film is great . [SEP]"
    assert len(data) == 2 and data.columns["mask_at"].tolist() == [[4], [4]]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_word_search_is_exhaustive_up_to_three_classes(classes):
    random = random_of("words", classes)
    logits, labels = torch.randn(12, 9, generator=random), torch.arange(12) % classes
    words = candidate_words(logits, labels, torch.ones(9, dtype=torch.bool), k=4)
    best = assignments(logits, labels, words, n=1)[0]

    def accuracy(one):
        return (logits[:, list(one)].argmax(-1) == labels).sum().item()

    every = [one for one in itertools.product(*words) if len(set(one)) == classes]
    assert accuracy(best) == max(map(accuracy, every))
    top = logits[labels == 0].mean(0).argsort(descending=True)[:4].tolist()
    assert words[0] == top


def test_many_classes_are_searched_by_beam():
    logits = 3 * torch.eye(8).repeat(4, 1) + 0.1 * torch.randn(32, 8, generator=random_of("b"))
    labels = torch.arange(32) % 8
    words = candidate_words(logits, labels, torch.ones(8, dtype=torch.bool), k=8)
    assert assignments(logits, labels, words, n=3)[0] == tuple(range(8))


def test_verbalizer_tokens_may_be_many(masked_tokenizer):
    assert [len(t) for t in Verbalizer.of({"a": "very good", "b": "bad"}).tokens(masked_tokenizer)] == [2, 1]
