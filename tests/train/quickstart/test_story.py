"""The whole story on two small domains: real training, real stores, real routing."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from hub.remotes.directory import DirectoryRemote
from hub.store import Store
from train.quickstart import findings, tables
from train.quickstart.gather import gather
from train.quickstart.measure import GAMMAS
from train.quickstart.report import page, write_report
from train.quickstart.story import Options, Story, run, usable_cpus

STEPS = 6


def tell(root, domains, **changes) -> Story:
    options = Options(**{"out": root / "out", "home": root / "home", "steps": STEPS, **changes})
    said = []
    found = gather(domains, seed=options.seed, say=said.append)
    assert len(said) == len(domains)
    return run(options, found, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("story")


@pytest.fixture(scope="module")
def story(root, two_domains) -> Story:
    return tell(root, two_domains)


def test_experts_are_published_with_their_provenance(story, root):
    local = Store(root / "home")
    for expert, domain in zip(story.experts, story.domains, strict=True):
        artifact = local.get(f"quickstart/{domain.name}@0.1.0")
        assert artifact.digest == expert.artifact.digest
        assert expert.trained
        manifest = artifact.manifest
        assert manifest.lineage.data == {domain.name: domain.digest}
        assert manifest.base.repo == "builtin:tiny-lm"
        assert manifest.trained_on.quantization == "nf4"
        assert manifest.domains == (domain.name,)
        assert {metric.metric for metric in manifest.metrics} >= {"perplexity"}
        assert len(expert.curve) == STEPS
        assert expert.curve[-1][1] < expert.curve[0][1]
    assert local.verify() == []


def test_the_second_store_holds_the_same_artifacts(story, root):
    second = Store(root / "out" / "store")
    assert second.verify() == []
    for expert in story.experts:
        assert second.get(expert.artifact.ref).digest == expert.artifact.digest
        assert DirectoryRemote(str(second.root)).catalogue(expert.artifact.ref.id).releases


def test_every_expert_is_the_best_on_its_own_domain_and_demix_follows(story):
    for result in story.results:
        assert result.best_name == result.name
        assert result.experts[result.name] < 0.9 * result.base
        assert result.demix < 1.03 * result.best_expert
    assert all(claim.holds for claim in findings.claims(story)), findings.claims(story)


def test_perplexities_are_those_of_the_documents(story):
    for result in story.results:
        tokens = sum(d.tokens for d in result.documents)
        assert result.demix == pytest.approx(math.exp(sum(d.demix for d in result.documents) / tokens))
        for i, value in enumerate(result.experts.values()):
            assert value == pytest.approx(math.exp(sum(d.experts[i] for d in result.documents) / tokens))


def test_regret_bound_recomputed_for_every_held_out_document(story):
    for result in story.results:
        assert len(result.documents) == 3
        for document in result.documents:
            assert document.demix <= min(document.experts) + math.log(2) + 1e-6
            assert document.regret == pytest.approx(document.demix - min(document.experts) - math.log(2), abs=1e-6)
            assert torch.allclose(document.path.sum(-1), torch.ones(document.tokens, dtype=torch.float64), atol=1e-9)
            assert document.path[0].tolist() == pytest.approx([0.5, 0.5])
            assert sum(document.final) == pytest.approx(1.0)


def test_on_the_stream_forgetting_lets_the_posterior_follow(story):
    stream = story.stream
    assert stream.demix < min(stream.experts.values())
    assert stream.demix < stream.by_gamma[1.0]
    assert set(stream.by_gamma) == set(GAMMAS)
    assert sorted(stream.domains) == ["ledger", "tale"]
    order = list(stream.experts)
    path = stream.paths[stream.gamma]
    ends = [*stream.borders[1:], len(path)]
    for name, end in zip(stream.domains, ends, strict=True):
        assert float(path[end - 1, order.index(name)]) > 0.9  # at the end of its stretch, its expert has the weight


def test_json_has_the_shape_scripts_rely_on(story):
    facts = json.loads(json.dumps(findings.as_dict(story), allow_nan=False))
    for name in ("ledger", "tale"):
        entry = facts["domains"][name]
        assert set(entry["experts"]) == {"ledger", "tale"}
        numbers = [entry[k] for k in ("base", "average", "uniform_ensemble", "demix", "best_expert")]
        assert all(isinstance(value, float) and value > 1 for value in numbers)
        assert entry["best_expert"] == min(entry["experts"].values())
    assert {"base", "experts", "average", "uniform_ensemble", "demix", "gamma", "by_gamma"} <= set(facts["stream"])
    assert facts["seconds"] > 0
    assert 100 < facts["peak_rss_mb"] < 4000
    assert facts["regret"]["documents"] == 6
    assert facts["mean"]["demix"] == pytest.approx(sum(facts["domains"][n]["demix"] for n in ("ledger", "tale")) / 2)


def test_what_is_trained_already_is_not_trained_again(story, root, two_domains, tmp_path):
    again = tell(root, two_domains, out=tmp_path)
    assert [e.trained for e in again.experts] == [False, False]
    assert [e.artifact.digest for e in again.experts] == [e.artifact.digest for e in story.experts]
    assert [e.curve for e in again.experts] == [e.curve for e in story.experts]
    for here, there in zip(again.results, story.results, strict=True):
        assert here.demix == pytest.approx(there.demix, rel=1e-4)


def test_other_data_of_one_domain_trains_that_one_alone(story, root, two_domains, tmp_path):
    changed = tmp_path / "tale"
    changed.mkdir()
    for file in two_domains["tale"].iterdir():
        (changed / file.name).write_text(file.read_text().replace("river", "mountain"))
    again = tell(root, {**two_domains, "tale": changed}, out=tmp_path / "out")
    assert [e.trained for e in again.experts] == [False, True]
    assert str(again.experts[1].artifact.ref) == "quickstart/tale@0.1.1"


def test_tables_show_every_figure(story):
    out = io.StringIO()
    tables.show(story, Console(file=out, width=100))
    text = out.getvalue()
    for result in story.results:
        for value in (result.base, result.average, result.uniform_ensemble, result.demix, *result.experts.values()):
            assert f"{value:.2f}" in text
    assert text.count("✓") == len(findings.claims(story))
    assert "✗" not in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_claims_that_do_not_hold_are_shown_as_such(story):
    from dataclasses import replace

    worse = tuple(replace(r, demix=10 * r.base) for r in story.results)
    stream = replace(story.stream, demix=10 * story.stream.base)
    broken = replace(story.results[0].documents[0], regret=0.5)
    worse = (replace(worse[0], documents=(broken, *worse[0].documents[1:])), *worse[1:])
    bad = replace(story, results=worse, stream=stream)
    assert [claim.holds for claim in findings.claims(bad)] == [False] * 7
    assert "5 of 6" in findings.claims(bad)[-1].text
    out = io.StringIO()
    tables.show(bad, Console(file=out))
    assert out.getvalue().count("✗") == 7
    assert page(bad).count('class="mark no"') == 7


class Tags(HTMLParser):
    """Collects tags, checks that they nest, and every attribute that could load something."""

    VOID = {"meta", "br", "use", "path", "rect", "line"}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.seen, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_stands_alone(story, tmp_path):
    path = write_report(story, tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(link.startswith("#") for link in tags.links)  # nothing is fetched from anywhere
    assert "@import" not in text
    assert "url(http" not in text
    assert tags.seen.count("svg") == len(story.results) + 5
    assert len(set(tags.ids)) == len(tags.ids)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {link[1:] for link in tags.links}
    assert used <= set(tags.ids)
    assert "#123456" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for result in story.results:
        assert f"{result.demix:.2f}" in text


def test_the_report_escapes_what_users_name(story):
    from dataclasses import replace

    options = replace(story.options, base='<script>"x"</script>')
    assert "<script>" not in page(replace(story, options=options))


@pytest.mark.parametrize(
    "kind",
    ["bottleneck", "prompt", *(pytest.param(k, marks=pytest.mark.slow) for k in ("dora", "ia3", "bias", "prefix"))],
)
def test_every_kind_makes_experts(two_domains, tmp_path, kind):
    found = tell(tmp_path, two_domains, kind=kind, steps=2, quantize="none")
    assert [e.artifact.manifest.kind for e in found.experts] == [kind, kind]
    for result in found.results:
        assert all(math.isfinite(value) for value in (result.average, result.demix, *result.experts.values()))
        assert all(document.regret <= 1e-6 for document in result.documents)


def test_cpus_are_at_least_one_and_at_most_the_machine():
    import os

    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
