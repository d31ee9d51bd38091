"""What is published answers alike everywhere: Python, `hub run`, `/v1/classify`, `hub eval`; from another home."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import hub as hub_api
import train
from hub.cli import main
from hub.errors import HubError, UsageError
from hub.store import Store
from router.engine.engine import Engine
from router.engine.request import Request as Asked
from train.fewshot.examples import Columns
from train.fewshot.job import METHODS
from train.fewshot.run import Request, run

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = {"feature", "multi-mask", "zero-shot"}  # the others train for seconds
WORDS = {"pos": ("great",), "neg": ("terrible",)}


def hub(*args: str, code: int = 0) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = CliRunner().invoke(main, list(args), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, masked_base):
    """Move what a store has to another home, where the base lies at another place, and work from another folder."""

    def move(ref: str) -> str:
        remote, home = tmp_path / "remote", tmp_path / "other home"
        base = tmp_path / "other place" / "the-base"
        hub("push", ref, "--to", str(remote))
        shutil.copytree(masked_base, base)
        monkeypatch.setenv("HUB_HOME", str(home))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        hub("pull", ref, "--from", str(remote))
        return str(base)

    return move


def publish(method, review_file, masked_base, **more):
    unlabelled = {"unlabeled": review_file(24, 16, "more.jsonl")} if method == "ipet" else {}
    request = Request(review_file(), masked_base, Columns(), k=4, method=method, publish="me/stars", max_length=32,
                      words=WORDS, budget=30.0, **unlabelled, **more)  # fmt: skip
    return run(request, store=Store()).classifier


def answers_everywhere(ref: str, base: str, texts, test: str) -> dict[str, torch.Tensor]:
    """(N, C) probabilities by each way of asking."""
    from starlette.testclient import TestClient

    from router.serving.app import create_app

    classifier = train.fewshot.load(ref, base=base)
    labels = classifier.labels
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path("in.jsonl").write_text(rows)
    hub("run", "in.jsonl", "--base", base, "--expr", ref, "--scores", "9", "--out", "out.jsonl", "--overwrite")
    out = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    by_run = torch.tensor([[row["output_scores"][label] for label in labels] for row in out])
    engine = Engine(base, store=Store())
    with TestClient(create_app(engine)) as client:
        listed = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
        said = client.post("/v1/classify", json={"model": ref, "input": list(texts)}).json()["data"]
        refused = client.post("/v1/completions", json={"model": ref, "prompt": "a"})
    assert ref in listed and refused.status_code == 400 and "/v1/classify" in refused.text
    served = torch.tensor([[one["scores"][label] for label in labels] for one in said])
    python = classifier.predict_proba(texts)
    assert [row["output"] for row in out] == [one["label"] for one in said] == classifier.predict(texts)
    facts = json.loads(hub("eval", ref, test, "--base", base, "--json", "-"))
    truth = [json.loads(line) for line in Path(test).read_text().splitlines()]
    guessed = classifier.predict([row["text"] for row in truth])
    right = sum(guess == row["label"] for guess, row in zip(guessed, truth, strict=True))
    assert facts["measures"]["accuracy"] == pytest.approx(right / len(truth))
    assert facts["task"] == "classification"
    return {"run": by_run, "served": served, "python": python}


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in sorted(METHODS)]
)
def test_the_same_probabilities_everywhere(method, review_file, masked_base, reviews_of, elsewhere):
    made = publish(method, review_file, masked_base)
    test = review_file(20, 60, "test.jsonl")
    texts = [e.text for e in reviews_of(7, 50)]
    told = made.predict_proba(texts)
    base = elsewhere("me/stars")
    answers = answers_everywhere("me/stars", base, texts, test)
    for where, said in answers.items():
        tolerance = 1e-4 if where == "run" else 1e-5  # files have four digits
        torch.testing.assert_close(said.float(), told, atol=tolerance, rtol=0, msg=lambda text, w=where: f"{w}: {text}")


def test_what_has_a_reader_is_listed_shown_and_refused_where_it_would_be_lost(review_file, masked_base, tmp_path):
    publish("feature", review_file, masked_base)
    publish("zero-shot", review_file, masked_base)  # me/stars@0.1.1
    assert "me/stars" in hub("list", "--task", "classification")
    manifest = Store().get("me/stars").manifest
    assert (manifest.task, manifest.labels, manifest.reader) == ("classification", ("neg", "pos"), "few_shot")
    assert "few_shot" in hub("show", "me/stars")
    for form in ("peft", "vllm", "merged"):
        with pytest.raises(HubError, match="answers through its reader few_shot") as error:
            hub_api.export("me/stars", form, tmp_path / form)
        assert "/v1/classify" in str(error.value.hint) and not (tmp_path / form).exists()
    Path(tmp_path / "rows.jsonl").write_text('{"text": "a good film"}\n')
    for expression in ("0.5 * me/stars", "me/stars@0.1.0 + me/stars@0.1.1"):
        said = hub("run", str(tmp_path / "rows.jsonl"), "--base", masked_base, "--expr", expression, code=1)
        assert "answers through its reader few_shot, by itself" in said
        with pytest.raises(UsageError, match="by itself"):
            train.evaluate(expression, review_file())
    refused = hub("route", "fit", "me/stars", "--method", "centroid", "-o", "me/router@1.0.0", code=2)
    assert "by itself" in refused
    with pytest.raises(UsageError, match="holds its base as int8"):
        Engine(masked_base, quantize="int8").prepare(Asked(text="a", adapter="me/stars"))


def test_rows_of_readers_heads_and_errors_share_an_engine(review_file, masked_base, reviews_of):
    one, two = publish("feature", review_file, masked_base), publish("fine-tune", review_file, masked_base)
    texts = [e.text for e in reviews_of(6, 50)]
    engine = Engine(masked_base, rows=4)
    try:
        asked = [Asked(text=text, adapter=f"me/stars@0.1.{i % 2}", scores=2) for i, text in enumerate(texts)]
        wrong = [Asked(text="   ", adapter="me/stars"), Asked(text="a", pair="b", adapter="me/stars")]
        said = engine.run([*asked, *wrong], strict=False)
        for i, answer in enumerate(said[:6]):
            told = dict(answer.scores)
            expected = (one, two)[i % 2].predict_proba(texts[i : i + 1])[0]
            torch.testing.assert_close(torch.tensor([told["neg"], told["pos"]]), expected, atol=1e-5, rtol=0)
        assert "empty" in said[6].message and "a pair" in said[7].message
        # The engine's encoder and the readers' model hold their weights once.
        mine = dict(engine.host.model.named_parameters())
        (shared,) = engine.readers._bases.values()
        assert sum(mine[name].data_ptr() == p.data_ptr() for name, p in shared.named_parameters() if name in mine) > 40
    finally:
        engine.close()


@pytest.mark.parametrize("method", ["fine-tune", "zero-shot"])
def test_a_plain_head_is_exported_without_loss_and_another_is_refused(method, review_file, masked_base, tmp_path):
    made = publish(method, review_file, masked_base)
    out = tmp_path / "sentences"
    if method == "zero-shot":
        with pytest.raises(HubError, match=r"no single head on plain texts: it reads mask of .*label words"):
            hub_api.export("me/stars", "sentence_transformers", out)
        assert not out.exists()
        return
    done = hub_api.export("me/stars", "sentence_transformers", out)
    assert done.measured["probabilities"] < 1e-4
    # What SentenceTransformer does with these files, by hand: it is no dependency.
    model, words = AutoModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    dense = load_file(out / "3_Dense" / "model.safetensors")
    texts = ["the good w3 film", "a bad plot"]
    inputs = words(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
        unit = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        said = (unit @ dense["linear.weight"].T + dense["linear.bias"]).softmax(-1)
    torch.testing.assert_close(said, made.predict_proba(texts), atol=1e-5, rtol=0)
    assert json.loads((out / "labels.json").read_text()) == ["neg", "pos"]
    assert [m["type"].rpartition(".")[2] for m in json.loads((out / "modules.json").read_text())] == [
        "Transformer", "Pooling", "Normalize", "Dense"]  # fmt: skip
    if find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        logits = SentenceTransformer(str(out), device="cpu").encode(texts, convert_to_tensor=True)
        torch.testing.assert_close(logits.softmax(-1), said, atol=1e-5, rtol=0)
