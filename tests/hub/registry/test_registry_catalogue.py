"""The web catalogue, by plain HTTP and in a real headless Chromium (which also says what scripts did)."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest

from hub.manifest import Draft
from hub.pack import pack
from hub.ref import AdapterRef
from hub.registry.state.front_matter import CardError, front_matter, parse_front_matter
from hub.registry.web.markdown import render

CARD = """---
license: apache-2.0
language: en
---
# Tone of voice

Makes answers *polite* and **short**. Trained on letters; see [the data](aux/data.md) and
[the paper](https://arxiv.org/abs/2106.09685).

![Loss](plot.png)

| split | accuracy |
|---|---:|
| test | 0.91 |

```python
model = compose.load("builtin:tiny-lm", "acme/tone")
```
"""

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "![x](javascript:alert(1))",
    '![x](y "onerror=alert(1)")',
    '[x](https://a.example/"onmouseover="alert(1))',
    "<a href='vbscript:x'>x</a>",
    "<iframe src='https://evil.example'></iframe>",
    "<style>*{display:none}</style>",
    "<form action='https://evil.example'><input></form>",
    "`<script>alert(1)</script>`",
    "```\n</code></pre><script>alert(1)</script>\n```",
    "[x]: javascript:alert(1)\n[x]",
    "<!--><script>alert(1)</script>-->",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "\x00<script>alert(1)</script>",
]


@pytest.fixture
def shop(site, files, base_identity, tmp_path):
    """A registry with a small shop of adapters, their versions, relations and cards."""

    def publish(ref: str, *, seed: int = 0, card: str = "# Card\n", extra: dict[str, bytes] | None = None, **facts):
        name, _, version = ref.partition("@")
        directory = files(ref.replace("/", "-"), seed=seed)
        (directory / "README.md").write_text(card)
        for path, data in (extra or {}).items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        pack(directory, Draft(name=name, version=version, **{"kind": "lora", "base": base_identity, **facts}))
        return site.store.put(directory)

    def score(metric: str, value: float, dataset: str = "letters", **more):
        return {"metric": metric, "value": value, "dataset": dataset, **more}

    png = b"\x89PNG\r\n\x1a\n" + bytes(40)
    law = publish("acme/law@1.0.0", seed=1, task="causal_lm", domains=("law",), metrics=(score("perplexity", 33.6),))
    tone = {
        "task": "causal_lm", "license": "apache-2.0", "languages": ("en",), "domains": ("letters",), "card": CARD,
        "summary": "Polite, short answers for letters", "extra": {"plot.png": png, "aux/data.md": b"letters\n"},
        "lineage": {"parents": (f"acme/law@{law.digest}",)},
    }  # fmt: skip
    publish("acme/tone@1.0.0", seed=2, **tone, metrics=(score("accuracy", 0.88, n=500), score("perplexity", 21.2)))
    better = (score("accuracy", 0.912, n=500, sd=0.004, seeds=(0, 1, 2)), score("perplexity", 20.75))
    publish("acme/tone@1.1.0", seed=3, **tone, metrics=better)
    site.store.tag("acme/tone@1.1.0", "prod")
    spam = {"task": "classification", "labels": ("ham", "spam"), "metrics": (score("accuracy", 0.97, "mail"),)}
    publish("bob/spam@0.3.0", seed=4, kind="ia3", **spam)
    both = {"type": "composition", "kind": "", "expression": "acme/tone + bob/spam"}
    publish("bob/both@1.0.0", seed=5, **both, requires=({"name": "acme/tone", "range": ">=1"}, {"name": "bob/spam"}))
    publish("acme/old@1.0.0", seed=6, summary="No longer kept", base=None)
    site.store.yank(AdapterRef.parse("acme/old@1.0.0"), "superseded by acme/tone")
    return site


def page(site, path: str, **options) -> str:
    answer = site.ask(path, headers={"Accept": "text/html", **options.pop("headers", {})}, **options)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/html")
    return answer.body.decode()


def names(text: str) -> list[str]:
    return [re.sub("<.*?>", "", found) for found in re.findall(r"<h2><a href=.*?>(.*?)</a></h2>", text)]


def test_search_and_filters(shop) -> None:
    assert sorted(names(page(shop, "/"))) == ["acme/law", "acme/tone", "bob/both", "bob/spam"]
    assert names(page(shop, "/?q=polite")) == ["acme/tone"]
    assert names(page(shop, "/?q=letters")) == ["acme/tone"]
    assert names(page(shop, "/?kind=ia3")) == ["bob/spam"]
    assert sorted(names(page(shop, "/?task=causal_lm"))) == ["acme/law", "acme/tone"]
    assert len(names(page(shop, "/?base=builtin:tiny-lm"))) == 4
    assert names(page(shop, "/?base=other")) == []
    assert names(page(shop, "/?metric=accuracy")) == ["bob/spam", "acme/tone"]  # the best first
    assert names(page(shop, "/?metric=perplexity")) == ["acme/tone", "acme/law"]  # less is better
    assert sorted(names(page(shop, "/?ns=bob"))) == ["bob/both", "bob/spam"]
    assert names(page(shop, "/?sort=name&kind=lora")) == ["acme/law", "acme/tone"]
    assert names(page(shop, "/?q=polite&kind=ia3")) == []
    assert "Nothing fits" in page(shop, "/?q=zebra")
    assert "holds no word" in page(shop, "/?q=%3F%3F")
    found = page(shop, "/?kind=lora&task=causal_lm")
    assert 'value="lora" selected' in found and "causal LM" in found
    assert shop.ask("/?page=0").status == 400
    assert shop.ask("/bob").status == 303


def test_pages_of_results(site, files) -> None:
    for index in range(30):
        directory = files(f"a{index}", seed=index)
        pack(directory, Draft(name=f"acme/a{index:02d}", version="1.0.0", kind="lora"))
        site.store.put(directory)
    first, second = page(site, "/?sort=name"), page(site, "/?sort=name&page=2")
    assert names(first) + names(second) == [f"acme/a{index:02d}" for index in range(30)]
    assert "/?sort=name&amp;page=2" in first and 'rel="next"' not in second
    assert "30 adapters" in first
    answer = site.ask("/api/models?limit=12")
    seen = [model["id"] for model in answer.json()]
    while "link" in answer.headers:
        link = re.match(r"<(.*?)>; rel=\"next\"", answer.headers["link"])
        assert link is not None
        answer = site.ask(link[1].removeprefix(site.url))
        seen += [model["id"] for model in answer.json()]
    assert seen == [f"acme/a{index:02d}" for index in range(30)]


def test_an_adapters_page(shop) -> None:
    text = page(shop, "/acme/tone")
    for expected in (
        "Polite, short answers for letters", "1.1.0", "@prod", "builtin:tiny-lm", "apache-2.0",
        "hub pull acme/tone@1.1.0", f"--from hf+{shop.url}", 'revision=&#34;1.1.0&#34;',
        "0.912", "± 0.004", "+0.032", "−0.45", "lora_A", "4 × 16", "adapter_model.safetensors",
        shop.store.get("acme/tone").digest, "<svg", "acme/law 1.0.0", "bob/both 1.0.0",
    ):  # fmt: skip
        assert expected in text, expected
    older = page(shop, "/acme/tone/tree/1.0.0")
    assert "0.88" in older and "@prod" not in older.split("Versions")[0]
    assert page(shop, f"/acme/tone/commit/{shop.context.repos.resolve('acme/tone', '1.0').oid}") == older
    assert "superseded by acme/tone" in page(shop, "/acme/old/tree/1.0.0")
    assert "acme/tone + bob/spam" in page(shop, "/bob/both")


def test_the_lineage_leads_on(shop) -> None:
    text = page(shop, "/acme/tone")
    links = re.findall(r'<a href="(/[a-z]+/[a-z]+/tree/[0-9.]+)"><g class="node"', text)
    assert sorted(links) == 2 * ["/acme/law/tree/1.0.0"] + 2 * ["/bob/both/tree/1.0.0"]  # drawn wide and tall
    assert 'class="edge requires"' in text
    for link in links:
        page(shop, link)
    assert 'class="node here"' in text
    assert "<svg" not in page(shop, "/acme/old/tree/1.0.0")  # related to nothing


def test_a_long_name_keeps_its_version_in_the_graph() -> None:
    from hub.registry.web.lineage_svg import _shortened

    assert _shortened("acme/tone 1.0.0", 20) == "acme/tone 1.0.0"
    assert _shortened("legal/case-summaries 1.10.0", 20) == "legal/case-s… 1.10.0"
    assert _shortened("a-digest-that-is-nowhere-here", 12) == "a-digest-th…"


def test_every_link_of_the_pages_leads_somewhere(shop) -> None:
    seen, queue = set(), ["/", "/acme/tone", "/bob/both"]
    while queue:
        path = queue.pop()
        answer = shop.ask(path, headers={"Accept": "text/html"})
        assert answer.status in (200, 303), path
        if answer.status == 200 and answer.headers["content-type"].startswith("text/html"):
            for link in re.findall(r'(?:href|src)="(/[^"#]*)"', answer.body.decode()):
                link = html.unescape(link)
                if link not in seen:
                    seen.add(link)
                    queue.append(link)
    assert len(seen) > 25


def test_a_draft_says_that_it_is_one(site, files, send_directory) -> None:
    directory = files("tone")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/<b>base"}')
    oid = send_directory(site, "acme/tone", directory)
    text = page(site, "/acme/tone")
    assert "it has passed no gate" in text and oid[:12] in text
    assert "the config names org/&lt;b&gt;base" in text
    assert f"revision=&#34;{oid}&#34;" in text


def test_an_empty_registry_says_what_to_do(site) -> None:
    text = page(site, "/")
    assert "0 adapters" in text and f"hub push acme/tone@1.0.0 --to hf+{site.url}" in text


def test_private_pages(guarded, send_directory, tag, files) -> None:
    wanted = {"name": "secret", "organization": "acme", "visibility": "private"}
    guarded.ask("/api/repos/create", "POST", wanted, token="alice")
    send_directory(guarded, "acme/secret", files(), token="alice")
    tag(guarded, "acme/secret", "1.0.0", token="alice")
    for token, seen in ((None, False), ("bob", False), ("reader", True), ("alice", True)):
        assert ("secret" in page(guarded, "/", token=token)) is seen
        assert ("lora (1)" in page(guarded, "/", token=token)) is seen  # nor do the counts of the filters tell
    refused = guarded.ask("/acme/secret", headers={"Accept": "text/html"})
    assert refused.status == 401 and b"/-/login" in refused.body
    assert guarded.ask("/acme/secret", headers={"Accept": "text/html"}, token="bob").status == 404
    assert "private" in page(guarded, "/acme/secret", token="reader")


def test_relations_do_not_tell_of_private_neighbours(guarded, files, packed) -> None:
    hidden = guarded.store.put(packed("acme/hidden@1.0.0")[0])
    parents = (f"acme/hidden@{hidden.digest}",)
    guarded.store.put(
        packed("bob/child@1.0.0", seed=1, lineage={"parents": parents}, requires=({"name": "acme/hidden"},))[0]
    )
    guarded.ask("/api/models/acme/hidden/settings", "PUT", {"visibility": "private"}, token="alice")
    graph = re.compile("<svg.*?</svg>", re.DOTALL)
    assert not graph.search(page(guarded, "/bob/child", token="bob"))
    assert "hidden 1.0.0" in graph.search(page(guarded, "/bob/child", token="reader"))[0]


def test_refusals_are_pages_for_people_and_json_for_programs(site) -> None:
    person = site.ask("/acme/nope", headers={"Accept": "text/html"})
    assert person.status == 404 and b"<h" not in person.body[:1] and b"There is no repository" in person.body
    program = site.ask("/acme/nope")
    assert program.json()["error"].startswith("There is no repository")
    assert (
        site.ask("/api/models/acme/nope", headers={"Accept": "text/html"}).headers["content-type"] == "application/json"
    )


# -- nothing that others wrote runs or leaves the page ---------------------------------------------------------------

EVIL = re.compile(
    r"<script(?! src=\"/static/)|<[^>]+\son\w+\s*=|javascript:|vbscript:|<iframe|<form action='|<style", re.I
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_cards_run_nothing(attack: str) -> None:
    for text in (attack, f"# x\n\n{attack}\n", f"> {attack}", f"- {attack}", f"| a |\n|---|\n| {attack} |"):
        found = render(text, "/acme/tone/resolve/main")
        tags = re.findall(r"<[^>]*>", found)
        assert not [tag for tag in tags if EVIL.search(tag) or "data:" in tag], found


def test_cards_keep_what_is_good() -> None:
    found = render(CARD, "/acme/tone/resolve/abc")
    assert found.startswith("<h1>Tone of voice</h1>")
    assert '<img src="/acme/tone/resolve/abc/plot.png" alt="Loss">' in found
    assert 'href="/acme/tone/resolve/abc/aux/data.md"' in found
    assert 'href="https://arxiv.org/abs/2106.09685" rel="noopener noreferrer nofollow"' in found
    assert "<table>" in found and "<pre><code>" in found
    assert "license" not in found
    far = render("![spy](https://evil.example/pixel.png)", "/a/b/resolve/c")
    assert "<img" not in far and "https://evil.example/pixel.png" in far  # named, not fetched


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\nx", {"license": "mit"}),
        ("---\n---\nx", {}),
        ("# no matter\n---\na: b\n---\n", {}),
        ("---\r\na: 1\r\n---\r\n", {"a": 1}),
        ("\ufeff---\na: 1\n---", {"a": 1}),
        ("---\na: |\n  x --- y\n---\n", {"a": "x --- y\n"}),
    ],
)
def test_front_matter(text: str, expected: dict) -> None:
    assert parse_front_matter(text) == expected


@pytest.mark.parametrize(
    "yaml",
    [
        "a: &x [1]\nb: *x",
        "a: &a {k: v}\nb: &b {<<: [*a, *a]}",
        "- " * 3000 + "x",
        "[a",
        "- a",
        "a: !!python/object:os.system x",
        "a: b: c",
        "&a [*a",
        "x" * 70_000,
        "a: 2026-99-99",
        "[" * 3000,
    ],
)
def test_front_matter_that_is_none(yaml: str) -> None:
    text = f"---\n{yaml}\n---\n"
    with pytest.raises(CardError):
        parse_front_matter(text)
    assert front_matter(text) == {}


def browse(
    chromium: str, url: str, tmp_path: Path, *options: str, size: str = "1280,900"
) -> subprocess.CompletedProcess:
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}", *options, url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def words(text: str) -> list[str]:
    return html.unescape(re.sub("<[^>]*>", " ", text)).split()


def test_in_a_real_browser(shop, chromium, tmp_path) -> None:
    """No error in its console, no policy violated; script or none, the page is all there; it fits a phone."""
    for path in ("/", "/acme/tone"):
        done = browse(chromium, shop.url + path, tmp_path, "--dump-dom", "--virtual-time-budget=3000")
        assert "moduloom" in done.stdout
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert console == []
        assert done.stdout.count('class="copy"') == done.stdout.count("data-copy")  # the script has run
        served = shop.ask(path).body.decode()  # what a browser without scripts shows
        assert 'class="copy"' not in served
        assert words(done.stdout.replace(">Copy<", "><")) == words(served)
    for name, size, options in (
        ("desktop", "1280,1000", ()),
        ("phone", "412,915", ("--force-device-scale-factor=2", "--blink-settings=preferredColorScheme=0")),
    ):
        shot = tmp_path / f"{name}.png"
        browse(chromium, f"{shop.url}/acme/tone", tmp_path, f"--screenshot={shot}", *options, size=size)
        data = shot.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_an_attack_card_in_a_real_browser(site, chromium, tmp_path, files, send_directory) -> None:
    """All attacks in one card: the title says whether any script has run, the console whether any was stopped."""
    directory = files("tone")
    attacks = "\n\n".join(attack.replace("alert(1)", "document.title='owned'") for attack in ATTACKS)
    (directory / "README.md").write_text(f"# Card\n\n{attacks.replace(chr(0), '')}\n")
    send_directory(site, "acme/tone", directory)
    done = browse(chromium, f"{site.url}/acme/tone", tmp_path, "--dump-dom", "--virtual-time-budget=3000")
    assert "<title>acme/tone" in done.stdout
    assert "owned</title>" not in done.stdout
    violations = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Content Security" in line]
    assert violations == []  # the policy had nothing to stop: the card was clean already
