"""From a configuration to a published artifact, on the built-in base and on a tiny BERT."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import compose
from compose.artifacts import probes
from compose.base.compatibility import BaseWarning
from hub.errors import Conflict, HubError, UsageError
from hub.store import Store
from train.config import TrainConfig, load_config
from train.data.datasets import load_splits
from train.errors import DataError, NonFiniteLoss, TrainError
from train.learner.heads import modules_to_save
from train.pipeline import prepare, run
from train.steps.evaluate import evaluate

LM = {"max_length": 32, "batch_size": 8, "duration": 6, "eval_every": 2, "lr": 5e-3, "options": {"r": 4}}


def lm(notes, **changes):
    return TrainConfig(**{**LM, "data": {"train": notes, "eval": 0.2}, **changes})


def classifier(base, train, held=0.25, **changes):
    values = {"base": base, "task": "classification", "data": {"train": train, "eval": held}, "max_length": 16}
    return TrainConfig(**{**values, "batch_size": 8, "duration": "25 epochs", "lr": 2e-2, **changes})


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_leaves_a_folder_and_an_artifact_that_reloads_with_equal_results(notes, tmp_path, quantize):
    config = lm(notes, quantize=quantize)
    out = run(config, folder=tmp_path / "run", ref="me/notes@1.2.0", license="apache-2.0")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "curves.svg", "curves.html", "run.log", "adapter"}
    assert load_config(tmp_path / "run" / "config.yaml") == config
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "eval" in r] == [2, 4, 6]
    assert "<svg" in (tmp_path / "run" / "curves.svg").read_text()
    assert "step 6: held-out loss" in (tmp_path / "run" / "run.log").read_text()

    artifact = Store().get("me/notes@1.2.0")
    assert artifact.digest == out.artifact.digest
    facts = artifact.manifest
    assert (facts.kind, facts.method, facts.task, facts.license) == ("lora", "lora", "causal_lm", "apache-2.0")
    assert facts.trained_on.quantization == quantize
    assert facts.trained_on.double_quant == (True if quantize == "nf4" else None)
    assert facts.trained_on.libraries["torch"] == torch.__version__
    assert facts.base == compose.identity(compose.load(config.base))
    assert facts.lineage.run == config.digest
    assert list(facts.lineage.data) == ["notes.txt"]
    assert {m.metric: m.value for m in facts.metrics} == {k: out.result.best[k] for k in ("loss", "perplexity")}
    assert str(tmp_path) not in artifact.read("README.md").decode() + facts.canonical.decode()
    assert 'compose.load("builtin:tiny-lm", "me/notes@1.2.0")' in artifact.read("README.md").decode()

    model = compose.load(config.base, "me/notes@1.2.0", quantize=quantize, dtype=config.precision)
    held = load_splits(config, compose.tokenizer(config.base)).eval
    again = evaluate(model, held, batch_size=2 * config.batch_size)
    assert again["loss"] == pytest.approx(out.result.best["loss"], rel=1e-5)
    bare = evaluate(compose.load(config.base, quantize=quantize, dtype=config.precision), held)
    assert out.result.best["loss"] < bare["loss"] - 0.1

    outcome = probes.check("me/notes@1.2.0")  # on the base held as it was in training
    assert outcome.same, outcome
    assert outcome.held == quantize
    assert probes.check("me/notes", quantize="int8").error > outcome.error


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_classifier_stores_its_head_and_its_labels(bert_base, reviews, tmp_path, quantize):
    config = classifier(bert_base, reviews(), quantize=quantize)
    out = run(config, folder=tmp_path / "run", ref="me/reviews")
    assert str(out.artifact.ref) == "me/reviews@0.1.0"
    assert out.result.best["accuracy"] == 1.0
    facts = out.artifact.manifest
    assert facts.labels == ("neg", "pos")
    stored = load_file(out.artifact.file("extra.safetensors"))
    assert {key.removeprefix("base_model.model.") for key in stored} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    model = compose.load(bert_base, "me/reviews", quantize=quantize)
    words = compose.tokenizer(bert_base)(["very good film", "the bad film"], return_tensors="pt")
    with torch.no_grad():
        guesses = model(**words).logits.argmax(-1).tolist()
    assert [model.config.id2label[g] for g in guesses] == ["pos", "neg"]
    assert probes.check("me/reviews", base=bert_base).same
    held = load_splits(config, compose.tokenizer(bert_base)).eval
    again = evaluate(model, held, batch_size=2 * config.batch_size)
    assert again["loss"] == pytest.approx(out.result.best["loss"], rel=1e-5)


def test_pairs_reach_the_model_with_their_segments(bert_base, reviews):
    ready = prepare(classifier(bert_base, reviews(text_pair="the plot")))
    batch = ready.splits.train.batch(torch.tensor([0]))
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_decoder_classifies_with_its_score_head(reviews):
    config = TrainConfig(task="classification", data={"train": reviews(8)}, max_length=16, options={"r": 2})
    model = compose.load(config.base, task="classification", labels=["a", "b"])
    assert modules_to_save(model, "classification") == ("score",)
    assert modules_to_save(compose.load(config.base), "causal_lm") == ()


def test_the_pooler_that_a_sentence_encoder_never_used_trains_with_the_head(bert_base, tmp_path):
    folder = tmp_path / "encoder"
    BertModel(BertConfig.from_pretrained(bert_base)).save_pretrained(folder)  # with a pooler
    for file, expected in ((None, ("classifier",)), ("modules.json", ("bert.pooler.dense", "classifier"))):
        if file:
            (folder / file).write_text("[]")
        model = compose.load(folder, task="classification", labels=["a", "b"])
        assert modules_to_save(model, "classification") == expected


def test_an_earlier_run_and_a_taken_version_are_refused_before_anything_is_loaded(notes, tmp_path, monkeypatch):
    config = lm(notes, duration=1)
    first = run(config, folder=tmp_path / "a", ref="me/x@1.0.0")
    loads = []
    monkeypatch.setattr(compose.api, "load", lambda *a, **k: loads.append(a))
    with pytest.raises(UsageError, match="holds an earlier run"):
        run(config, folder=tmp_path / "a", ref="me/x@2.0.0")
    with pytest.raises(Conflict, match="is published already"):
        run(config, folder=tmp_path / "b", ref="me/x@1.0.0")
    assert not (tmp_path / "b").exists()
    assert loads == []
    assert Store().get("me/x").digest == first.artifact.digest


def test_the_next_version_follows_the_highest(notes, tmp_path):
    config = lm(notes, duration=1)
    refs = [
        str(run(config, folder=tmp_path / str(i), ref=ref).artifact.ref) for i, ref in enumerate(["x", "x@1.4.7", "x"])
    ]
    assert refs == ["local/x@0.1.0", "local/x@1.4.7", "local/x@1.4.8"]


def test_without_publishing_the_adapter_stays_in_the_folder(notes, tmp_path):
    out = run(lm(notes, duration=1), folder=tmp_path / "a", ref="x", publishing=False)
    assert out.artifact is None
    assert (tmp_path / "a" / "adapter" / "module.json").is_file()
    assert Store().list() == []


def test_a_run_that_diverges_keeps_the_best_adapter_unpublished(notes, tmp_path, monkeypatch):
    """The rate is sane until step 3; then the optimizer overflows the weights and the next loss is NaN."""
    import train.state

    rate = train.state.learning_rate
    monkeypatch.setattr(
        train.state, "learning_rate", lambda c, step, total: 1e38 if step == 3 else rate(c, step, total)
    )
    config = lm(notes, duration=30, clip=0, eval_every=2)
    with pytest.raises(
        NonFiniteLoss, match=r"step 5 \(epoch 1\): loss is nan .* kept the best state, of step 2"
    ) as caught:
        run(config, folder=tmp_path / "a", ref="x")
    assert str(tmp_path / "a" / "adapter") in caught.value.hint
    tensors = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert Store().list() == []
    lines = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert json.loads(lines.splitlines()[-1])["eval"]["loss"] is None


def test_a_run_that_overflows_before_any_evaluation_leaves_no_adapter(notes, tmp_path):
    config = lm(notes, duration=30, lr=1e38, clip=0, schedule="constant", warmup=0.0, eval_every=0)
    with pytest.raises(NonFiniteLoss, match="kept nothing"):
        run(config, folder=tmp_path / "a", ref="x")
    assert not (tmp_path / "a" / "adapter").exists()


def test_rows_longer_than_the_base_are_refused(notes):
    with pytest.raises(DataError, match=r"rows of 900 tokens; this base reads 512") as caught:
        prepare(lm(notes, max_length=900))
    assert caught.value.hint == "max_length=512"


def test_virtual_tokens_count_where_positions_are_a_table(bert_base, reviews):
    config = classifier(bert_base, reviews(), method="prefix", options={"num_virtual_tokens": 30})
    with pytest.raises(DataError, match=r"rows of 10 tokens and the adapter 30 more; this base reads 32"):
        prepare(config)


def test_language_modelling_needs_a_base_that_looks_back_only(bert_base, notes):
    with pytest.raises(TrainError, match="sees those after it"), pytest.warns(BaseWarning, match="drawn with seed 0"):
        prepare(lm(notes, base=bert_base))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "loar"}, "lora"),
        ({"options": {"rank": 3}}, "rank"),
        ({"options": {"target_modules": ["nope"]}}, "nope"),
    ],
)
def test_unknown_methods_and_options_are_refused(notes, changes, said):
    with pytest.raises(HubError, match=said):
        prepare(lm(notes, **changes))


@pytest.mark.parametrize("changes", [{"method": "loar"}, {"data": {"train": "nowhere.txt"}}, {"max_length": 900}])
def test_a_run_that_fails_before_its_first_step_leaves_nothing(notes, tmp_path, changes):
    with pytest.raises(HubError):
        run(lm(notes, **changes), folder=tmp_path / "a", ref="x")
    assert not (tmp_path / "a").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(notes, tmp_path):
    config = lm(notes, duration=2)
    run(config, folder=tmp_path / "a", ref="x", publishing=False)
    before = (tmp_path / "a" / "config.yaml").read_text()
    with pytest.raises(HubError, match="nothing to resume"):
        run(lm(notes, lr=1.0), folder=tmp_path / "a", ref="x", resume=True)
    assert (tmp_path / "a" / "config.yaml").read_text() == before
    with pytest.raises(HubError, match="nothing to resume"):
        run(config, folder=tmp_path / "b", ref="x", resume=True)
    assert not (tmp_path / "b").exists()


def test_eval_labels_unseen_in_training_are_named(bert_base, reviews, tmp_path):
    other = tmp_path / "eval.jsonl"
    other.write_text('{"text": "a plot", "label": "pos"}\n{"text": "a plot", "label": "mixed"}\n')
    with pytest.raises(DataError, match=r"unseen in training: mixed .*row 2"):
        prepare(classifier(bert_base, reviews(), str(other)))


def test_cut_rows_are_said(bert_base, reviews, caplog):
    with caplog.at_level(logging.WARNING):
        prepare(classifier(bert_base, reviews(), max_length=5))
    assert "rows were cut to 5 tokens" in caplog.text


def test_resuming_after_an_interruption_gives_the_same_artifact(notes, tmp_path, monkeypatch):
    """The checkpoint holds the trainable state of the kind itself, so prefixes resume like any other."""
    config = lm(notes, method="prefix", options={}, duration=4)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    straight = run(config, folder=tmp_path / "a", ref="me/p@1.0.0")
    import train.loop

    real = train.loop.write_checkpoint

    def interrupted(path: Path, state):
        real(path, state)
        if state["result"]["steps"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.loop, "write_checkpoint", interrupted)
    store = Store(tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        run(config, folder=tmp_path / "b", ref="me/p@1.0.0", store=store, save_every=1)
    assert "interrupted; --resume goes on from" in (tmp_path / "b" / "run.log").read_text()
    monkeypatch.setattr(train.loop, "write_checkpoint", real)
    resumed = run(config, folder=tmp_path / "b", ref="me/p@1.0.0", store=store, save_every=1, resume=True)
    assert resumed.artifact.digest == straight.artifact.digest
