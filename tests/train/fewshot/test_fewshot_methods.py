"""Whole methods on a tiny base, publishing, and the command line."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import compose
import train
from hub.cli import main
from hub.errors import Conflict, NotFound, UsageError
from hub.store import Store
from train.errors import DataError, TrainError
from train.fewshot.classifier.classifier import FewShotClassifier, load_base
from train.fewshot.examples import Columns, Example
from train.fewshot.job import learn
from train.fewshot.prompts import likelihood
from train.fewshot.prompts import written_templates as generate
from train.fewshot.prompts.template import Template
from train.fewshot.recipes.ipet import ipet
from train.fewshot.recipes.pet import Recipe, pet
from train.fewshot.run import Request, interval, run

pytestmark = pytest.mark.filterwarnings("ignore")


def accuracy(learned, examples) -> float:
    logits = learned.classifier.logits(examples)
    right = torch.tensor([learned.classifier.labels.index(e.label) for e in examples])
    return (logits.argmax(1) == right).double().mean().item()


@pytest.mark.parametrize("method", ["auto", "feature", "fine-tune", "lm-bff", "multi-mask"])
def test_a_method_learns_what_one_word_decides(make_job, reviews_of, method):
    job = make_job(examples=tuple(reviews_of(16)))
    learned = learn(job, method)
    assert learned.method == method
    assert accuracy(learned, job.examples) >= 0.8
    assert not learned.adapter.trainable


def test_demonstrations_are_averaged_over(make_job, reviews_of):
    job = make_job(examples=tuple(reviews_of(16)))
    learned = learn(job, "lm-bff-demo")
    logits = learned.classifier.logits(job.examples)
    assert (logits.argmax(1) == job.answers).double().mean() >= 0.7


def test_ipet_and_pet_distil_on_unlabelled_text_and_resume(make_job, reviews_of, tmp_path):
    texts = tuple(Example(e.text) for e in reviews_of(24, 16))
    recipe = Recipe(steps=8, distil_steps=8)
    job = make_job(examples=tuple(reviews_of(8)), unlabeled=texts)
    said: list[str] = []
    job.say = said.append
    job.folder = tmp_path
    learned = ipet(job, recipe, generations=2)
    assert learned.facts["unlabeled"] == 24 and said[-1].endswith("soft")
    again = make_job(examples=tuple(reviews_of(8)), unlabeled=texts)
    again.say, again.folder = (more := []).append, tmp_path
    resumed = ipet(again, recipe, generations=2).classifier
    assert torch.equal(resumed.logits(texts), learned.classifier.logits(texts))
    assert more == []  # every stage was kept
    assert pet(make_job(unlabeled=texts), Recipe(steps=2, distil_steps=2, lm_alpha=0.9999)).facts["unlabeled"] == 24
    job = make_job(examples=tuple(reviews_of(16)), templates=("{text} it was {mask}.",))
    assert accuracy(pet(job, Recipe(steps=40, distil_steps=20)), job.examples) >= 0.75  # distilled on the examples
    with pytest.raises(DataError, match="there are none") as error:
        ipet(make_job(), recipe)
    assert error.value.hint == "--unlabeled FILE"


def test_zero_shot_needs_words_that_speak(make_job, reviews_of):
    examples = tuple(Example(e.text, None, "01"[e.label == "pos"]) for e in reviews_of(8))
    job = make_job(examples=examples, labels=("0", "1"), words={})
    with pytest.raises(TrainError, match="say nothing"):
        learn(job, "zero-shot")
    assert accuracy(learn(make_job(examples=examples, labels=("0", "1"), words={}), "lm-bff"), examples) >= 0.75
    assert learn(make_job(), "zero-shot").classifier.spec.members[0].strength == 1.0


def test_unknown_methods_are_answered_with_the_nearest(make_job):
    with pytest.raises(UsageError, match="'pett'") as error:
        learn(make_job(), "pett")
    assert "pet" in str(error.value.hint)


def test_a_classifier_in_three_lines(review_file, masked_base):
    made = train.few_shot(review_file(), masked_base, k=4, method="feature", publish="me/stars", max_length=32)
    again = train.fewshot.load("me/stars")
    texts = ["the good film", "a bad film"]
    assert again.predict(texts) == [again.labels[i] for i in again.predict_proba(texts).argmax(1)]
    assert again.predict(texts) == made.classifier.predict([Example(text) for text in texts])
    torch.testing.assert_close(again.predict_proba(texts).sum(1), torch.ones(2))
    assert again.predict([]) == [] and again.predict_proba([]).shape == (0, 2)
    with pytest.raises(DataError, match="a pair, and single texts are read"):
        again.predict([("a film", "a plot")])
    said = CliRunner().invoke(main, ["few-shot", "predict", "me/stars", "--text", texts[0]])
    assert said.stdout.split("\t")[0] == again.predict(texts[:1])[0]
    for wrong in (5, ("a", "b", "c"), ["a", 5]):
        with pytest.raises(DataError, match="neither a text nor a pair"):
            again.predict([wrong])


@pytest.mark.parametrize("method", ["multi-mask", "lm-bff", "feature"])
def test_a_published_classifier_reloads_with_equal_logits(review_file, masked_base, tmp_path, reviews_of, method):
    store = Store(tmp_path / "home")
    request = Request(review_file(), masked_base, Columns(), k=4, method=method, publish="me/reviews", max_length=32,
                      words={"pos": ("great",), "neg": ("terrible",)})  # fmt: skip
    kept = {}
    from train.fewshot import run as module

    original = module.publish

    def publish(learned, *rest):
        kept["logits"] = learned.classifier.logits(reviews_of(6, 50))
        return original(learned, *rest)

    module.publish = publish
    try:
        found = run(request, store=store).facts
    finally:
        module.publish = original
    again = FewShotClassifier.load(found["ref"], store=store)
    assert torch.equal(again.logits(reviews_of(6, 50)), kept["logits"])
    assert found["ref"] == "me/reviews@0.1.0" and not store.verify(found["ref"])
    manifest = store.get(found["ref"]).manifest
    assert manifest.method == f"few-shot/{method}" and manifest.labels == ("neg", "pos")
    assert {m.metric for m in manifest.metrics} == {"accuracy", "f1"} and manifest.metrics[0].n == found["test_rows"]
    assert manifest.metrics[0].value == found["accuracy"]
    model = compose.load(masked_base, found["ref"], store=store)  # a normal artifact
    assert type(model).__name__ == "BertForMaskedLM"
    with pytest.raises(Conflict, match="published already"):  # before anything is trained
        run(replace(request, publish="me/reviews@0.1.0", method="nothing such"), store=store)


def test_what_is_not_a_classifier_is_refused(tmp_path, masked_base):
    with pytest.raises(NotFound):
        FewShotClassifier.load("me/none", store=Store(tmp_path))


def test_a_causal_base_learns_from_its_states(review_file, tmp_path):
    request = Request(review_file(24), "builtin:tiny-lm", Columns(), k=4, publish="me/causal", budget=0.01)
    store = Store(tmp_path / "home")
    found = run(request, store=store).facts
    assert found["views"] == 2 and found["test_rows"] == 16
    assert len(FewShotClassifier.load(found["ref"], store=store).predict([Example("the good film")])) == 1
    with pytest.raises(UsageError, match="reads a mask"):
        run(Request(review_file(24), "builtin:tiny-lm", Columns(), k=4, method="pet"), store=store)


def test_few_rows_of_many_labels_go_through(masked_base, tmp_path):
    """RAFT's shape: 50 rows, long texts, 49 labels, most of them once."""
    path = tmp_path / "raft.jsonl"
    rows = [
        {"text": f"w{i % 20} " * 90 + f"film w{i % 7}", "label": f"label {chr(97 + i % 7)} {i % 49}"} for i in range(50)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(Request(str(path), masked_base, Columns(), budget=0.01)).facts
    assert found["train_rows"] == 50 and len(found["labels"]) == 49 and found["test_rows"] == 0


def test_the_interval_is_wilsons():
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(0, 10)[0] == pytest.approx(0, abs=1e-9)


# -- models without a mask -------------------------------------------------------------------------------------------


def test_causal_likelihood_is_the_words_and_the_rest():
    model, tokenizer = compose.load("builtin:tiny-lm", dtype="fp32"), compose.tokenizer("builtin:tiny-lm")
    template, words = Template.parse("{text} It was {mask}."), ["good", "very bad indeed"]
    examples = [Example("A film."), Example("One more film, and a long one.")]
    scores = likelihood.causal_scores(model, tokenizer, template, examples, words)
    for i, example in enumerate(examples):
        for c, word in enumerate(words):
            start = tokenizer(f"{example.text} It was")["input_ids"]
            end = tokenizer(f" {word}.", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([start + end])
            with torch.no_grad():
                log_p = model(ids).logits[0].log_softmax(-1)
            wanted = sum(log_p[len(start) - 1 + j, token].item() for j, token in enumerate(end))
            assert scores[i, c].item() == pytest.approx(wanted, abs=1e-3)


def test_t5_scores_the_filling_of_the_span(tiny_t5):
    model, tokenizer = tiny_t5
    template = Template.parse("{text} it was {mask} .")
    scores = likelihood.infill_scores(model, tokenizer, template, [Example("good film")], ["great", "bad plot"])
    text = tokenizer("good film it was <extra_id_0> .", return_tensors="pt")["input_ids"]
    target = tokenizer("<extra_id_0> bad plot <extra_id_1>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(input_ids=text, labels=torch.tensor([target])).logits[0].log_softmax(-1)
    assert scores[0, 1].item() == pytest.approx((log_p[1, target[1]] + log_p[2, target[2]]).item(), abs=1e-4)


def test_the_template_search_sums_over_examples_and_is_sorted(tiny_t5):
    model, tokenizer = tiny_t5
    texts = ["good film <extra_id_0> great <extra_id_1>", "bad plot was <extra_id_0> awful <extra_id_1>"]
    beams = generate.beam_search(model, tokenizer, texts, beam=6, max_tokens=5)
    assert beams and [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    best = beams[0]
    wanted = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        decoder = torch.tensor([[0, *best.tokens[:-1]]])
        with torch.no_grad():
            log_p = model(input_ids=ids, decoder_input_ids=decoder).logits[0].log_softmax(-1)
        wanted += sum(log_p[j + 1, token].item() for j, token in enumerate(best.tokens[1:]))
    assert best.score == pytest.approx(wanted, abs=1e-3)


def test_written_templates_can_be_read(tiny_t5, reviews_of):
    model, tokenizer = tiny_t5
    found = generate.templates(model, tokenizer, reviews_of(4), ("bad", "great"), ("neg", "pos"), beam=8)
    assert found and all(Template.parse(t.format()) == t for t, _ in found)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    pairs = [Example("Good film.", "A plot", "pos"), Example("Bad film.", "The plot", "neg")]
    assert all(
        t.paired for t, _ in generate.templates(model, tokenizer, pairs, ("bad", "great"), ("neg", "pos"), beam=4)
    )


def test_what_a_t5_has_learned_to_write_is_found(tiny_t5, reviews_of):
    model, tokenizer = copy.deepcopy(tiny_t5[0]).train(), tiny_t5[1]
    word, rows = {"neg": "bad", "pos": "great"}, reviews_of(8)
    sources = [generate.source_texts(e, word[e.label]) for e in rows]
    written = ("<extra_id_0> it was <extra_id_1> . <extra_id_2>", "<extra_id_0> is this <extra_id_1> ? <extra_id_2>")
    batches = [
        tokenizer([pair[way] for pair in sources], padding=True, return_tensors="pt")
        | {"labels": tokenizer([written[way]] * len(rows), return_tensors="pt")["input_ids"]}
        for way in range(2)
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        optimizer.zero_grad()
        model(**batches[step % 2]).loss.backward()
        optimizer.step()
    found = generate.templates(model.eval(), tokenizer, rows, ("bad", "great"), ("neg", "pos"), beam=8)
    assert {t.format() for t, _ in found[:2]} == {"{text} it was {mask}.", "is this {mask}? {text}"}


def test_lm_bff_takes_templates_from_a_writer(make_job, reviews_of, tiny_t5, tmp_path):
    model, tokenizer = tiny_t5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    job = make_job(examples=tuple(reviews_of(8)), writer=str(tmp_path))
    with pytest.raises(DataError, match="encoder-decoder"):  # it writes; it is no base
        load_base(str(tmp_path))
    said: list[str] = []
    job.say = said.append
    learned = learn(job, "lm-bff")
    assert learned.facts["templates"][0] not in job.patterns and "wrote" in said[0]
    assert torch.isfinite(learned.classifier.logits(reviews_of(4))).all()


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "home"))

    def invoke(*words: str):
        return CliRunner().invoke(main, list(words))

    return invoke


def test_the_whole_story_on_the_command_line(hub, review_file, masked_base, tmp_path):
    words = ["--word", "pos=great", "--word", "neg=terrible", "--max-length", "32"]
    test = review_file(12, 0, "test.jsonl")  # rows of the training file: counted
    out = tmp_path / "out.json"
    done = hub("few-shot", review_file(), "--base", masked_base, "--k", "4", *words, "--test", test, "--budget", "1s",
               "--publish", "me/reviews", "--json", str(out))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output and "hub few-shot predict me/reviews@0.1.0" in done.output
    found = json.loads(out.read_text())
    assert found["test_rows"] == 12 and found["test_rows_also_in_training"] > 0
    told = hub("few-shot", "predict", "me/reviews", "--text", "the good film", "--json")
    line = json.loads(told.stdout)
    assert line["label"] in ("pos", "neg") and sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert len(hub("few-shot", "predict", "me/reviews", test).stdout.splitlines()) == 12


def test_patterns_are_shown_filled(hub, review_file, masked_base):
    shown = hub(
        "few-shot",
        "patterns",
        review_file(),
        "{text} was {mask}!",
        "--base",
        masked_base,
        "--word",
        "pos=great,greatly",
    )
    assert shown.exit_code == 0, shown.output
    assert (
        "w1 film w0 was [MASK]!" in shown.output
        and "greatly (unknown" in shown.output
        and "great (one token)" in shown.output
    )


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--k", "30"], 1, "are asked for"),
        (["--k", "4", "--template", "{text} is"], 2, "no mask"),
        (["--k", "4", "--word", "pos=greatly", "--word", "neg=bad", "--method", "lm-bff"], 2, "'greatly'"),
        (["--k", "4", "--word", "poss=great"], 2, "poss"),
        (["--k", "4", "--method", "autoo"], 2, "did you mean auto"),
        (["--k", "4", "--text", "txt"], 1, "did you mean 'text'"),
        (["--k", "1"], 1, "two rows"),
        (["--k", "4", "--method", "ipet"], 1, "--unlabeled FILE"),
        (["--k", "4", "--method", "feature", "--unlabeled", "x.jsonl"], 2, "reads no unlabelled texts"),
        (["--k", "4", "--resume", "x"], 2, "no stages to resume"),
        (["--k", "4", "--writer", "t5-small"], 2, "asks no T5"),
    ],
)
def test_bad_options_end_in_one_sentence_and_a_hint(hub, review_file, masked_base, options, code, said):
    done = hub("few-shot", review_file(), "--base", masked_base, *options)
    assert done.exit_code == code and said in done.output, done.output
    assert "Traceback" not in done.output


def test_bad_rows_are_refused_before_anything_is_trained(hub, masked_base, tmp_path):
    def told(*rows) -> str:
        path = tmp_path / "bad.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = hub("few-shot", str(path), "--base", masked_base)
        assert done.exit_code == 1
        return done.output

    good, bad = {"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}
    assert "every row has the label 'pos'" in told(good, {**good, "text": "fine"})
    assert "[MASK]" in told(good, {**bad, "text": "so [MASK]"})
    assert "1 empty texts" in told(good, {**bad, "text": " "})
    assert "1000 different labels" in told(*({"text": f"t{i}", "label": f"c{i}"} for i in range(1000)))
