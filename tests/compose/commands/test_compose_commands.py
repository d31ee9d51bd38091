"""``hub compose``: what its verbs print, where, and with which exit code."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import compose
from compose.base.families import FAMILIES
from compose.function import functions
from compose.kind.registry import kinds

TINY = "builtin:tiny-lm"
Run = Callable[..., Any]


def data(result: Any) -> Any:
    """Stdout as JSON."""
    return json.loads(result.stdout)


# -- help and start ------------------------------------------------------------------------------------------------


def test_help_and_what_needs_no_model_start_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from hub.cli import main\n"
        "for words in (['--help'], ['compose', '--help'], ['compose', 'a', '--help'], ['compose', 'functions'],\n"
        "              ['compose', 'check', 'a +'], ['compose', 'check', 'a + b'], ['compose', 'a']):\n"
        "    try:\n"
        "        main(words, prog_name='hub')\n"
        "    except SystemExit as done:\n"
        "        print(done.code, file=sys.stderr)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    env = {**os.environ, "HUB_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stderr.splitlines() if line.isdigit()]
    assert codes == ["0", "0", "0", "0", "2", "1", "2"]


def test_help_lists_verbs_and_the_form_that_publishes(cli: Run) -> None:
    text = cli("compose", "--help").stdout
    for verb in ("check", "explain", "sites", "kinds", "functions", "map", "doctor"):
        assert f"\n  {verb} " in text
    assert "EXPR -o NS/NAME@VERSION" in text
    assert "--merge" in cli("compose", "a + b", "--help").stdout


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (("a + b",), "what is to be done with 'a + b'?", "-o NS/NAME@VERSION publishes it"),
        (("chek", "a + b"), "an expression is one argument", "did you mean check?"),
        (("explian",), "what is to be done", "did you mean explain?"),
        (("a", "+", "b", "-o", "ns/c@1"), "an expression is one argument, not 3", "hub compose 'a + b'"),
        (("-o", "ns/c@1.0.0"), "which expression?", "hub compose 'a + b'"),
        (("a", "-o", "ns/c@1.0.0", "--rank", "4"), "--rank is the rank of a merged adapter", "add --merge"),
        (("a", "-o", "ns/c@1.0.0", "--adapter", "x"), "does not say which name", "--adapter name=DIR|REF"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_to_write(words: tuple[str, ...], says: str, hint: str, cli: Run) -> None:
    result = cli("compose", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr
    assert hint in result.stderr


# -- sites, kinds, functions ---------------------------------------------------------------------------------------


def test_sites_of_a_known_family(cli: Run) -> None:
    found = data(cli("compose", "sites", TINY, "--json"))
    assert (found["model_type"], found["known_family"]) == ("llama", True)
    assert len(found["sites"]) == 6 * 7 + 1
    first, last = found["sites"][0], found["sites"][-1]
    assert (first["name"], first["path"]) == ("0.attn.q", "model.layers.0.self_attn.q_proj")
    assert (first["in"], first["out"], first["by"]) == (192, 192, "table")
    assert first["why"] == "table of llama: self_attn.q_proj"
    assert (last["path"], last["by"]) == ("lm_head", "outside")
    text = cli("compose", "sites", TINY).stdout.splitlines()
    assert text[1].split() == [
        "0.attn.q",
        first["path"],
        "192",
        "->",
        "192",
        "table",
        "of",
        "llama:",
        "self_attn.q_proj",
    ]
    assert len(text) == 1 + 43
    assert len(cli("compose", "sites", TINY, "--brief").stdout.splitlines()) == 1 + 8


def test_sites_of_a_family_that_is_in_no_table(cli: Run, tmp_path: Path) -> None:
    assert "rwkv" not in FAMILIES
    config = hf.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, architectures=["RwkvForCausalLM"])
    config.save_pretrained(tmp_path)
    result = cli("compose", "sites", str(tmp_path), "--json")
    found = {site["path"]: site for site in data(result)["sites"]}
    named = found["rwkv.blocks.0.attention.key"]
    assert (named["role"], named["by"]) == ("attn.k", "name")
    assert named["why"] == "by its name: key is attn.k in other families"
    stranger = found["rwkv.blocks.0.attention.receptance"]
    assert (stranger["role"], stranger["by"]) == ("linear.attention.receptance", "path")
    assert "not in the table" in cli("compose", "sites", str(tmp_path)).stderr


def test_sites_of_what_is_no_base(cli: Run, tmp_path: Path) -> None:
    assert cli("compose", "sites", "builtin:tiny-ml").exit_code == 1
    assert "did you mean" in cli("compose", "sites", "builtin:tiny-ml").stderr
    assert "no config.json" in cli("compose", "sites", str(tmp_path)).stderr


def test_kinds_follow_from_the_registry(cli: Run) -> None:
    found = {row["kind"]: row for row in data(cli("compose", "kinds", "--json"))}
    assert found.keys() == kinds().keys()
    for name, cls in kinds().items():
        row = found[name]
        assert (row["paper"], row["peft_type"]) == (cls.paper, cls.peft_type)
        assert row["what"].endswith(".")
        assert [option["name"] for option in row["options"]] == list(cls.Config.model_fields)
        assert all(option["description"] for option in row["options"])
    text = cli("compose", "kinds").stdout
    assert len(text.splitlines()) == 1 + len(found)
    detail = cli("compose", "kinds", "lora").stdout
    assert "PEFT type LORA" in detail
    assert any(line.split()[:3] == ["r", "int", "8"] for line in detail.splitlines())
    assert cli("compose", "kinds", "lroa").exit_code == 1


def test_functions_follow_from_the_registry(cli: Run) -> None:
    found = {row["name"]: row for row in data(cli("compose", "functions", "--json"))}
    assert found.keys() == functions().keys()
    options = {option["name"]: option for option in found["ties"]["options"]}
    assert options["lambda"]["default"] == "1.0"
    assert options["variant"]["type"] == "paper | peft | mergekit"
    assert options["weights"]["type"] == "list of float"
    assert "share of the entries" in cli("compose", "functions", "ties").stdout
    wrong = cli("compose", "functions", "tis")
    assert (wrong.exit_code, "did you mean ties" in wrong.stderr) == (2, True)


# -- check and explain ---------------------------------------------------------------------------------------------


def test_check_says_yes(cli: Run, store: Any) -> None:
    result = cli("compose", "check", "ns/a + 0.5 * ns/b >> ns/p")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "3 adapters, every tensor fits" in result.stderr
    found = data(cli("compose", "check", "ns/a", "--base", TINY, "--json"))
    assert (found["ok"], found["base"], found["warnings"]) == (True, TINY, [])


@pytest.mark.parametrize(
    ("text", "code", "carets", "says"),
    [
        ("ns/a + * ns/b", 2, "*", "does not fit"),
        ("ns/a + averag(ns/b)", 2, "averag", "unknown function"),
        ("ties(ns/a, ns/b, densty=0.3)", 2, "densty=0.3", "no option 'densty'"),
        ("average(ns/a, ns/b, weights=[1])", 2, "weights=[1]", "2 adapters and 1 weights"),
        ("ns/a / ns/b", 2, "/", "no meaning here"),
        ("ns/a + ns/zz", 1, "ns/zz", "there is no adapter ns/zz"),
        ("ns/a + ns/a@9.0.0", 1, "ns/a@9.0.0", "not in the store"),
        ("ns/b >> ns/a + average(ns/a, ns/n)", 1, "average(ns/a, ns/n)", "one kind|no parameters in common"),
        ("ns/a + (0.5 * ns/q >> ns/b)", 1, "0.5 * ns/q", "a prompt is there or not"),
        ("ns/a >> 2 * ensemble.mean(ns/a, ns/b)", 1, None, "outermost"),
    ],
)
def test_check_points_at_what_is_wrong(
    text: str, code: int, carets: str | None, says: str, cli: Run, store: Any
) -> None:
    import re

    result = cli("compose", "check", text, "--base", TINY)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert re.search(says, result.stderr)
    lines = result.stderr.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() == text)
    marked = lines[at + 1]
    assert set(marked.strip()) == {"^"}
    if carets:
        start = marked.index("^") - 2
        assert text[start : start + marked.count("^")] == carets
    again = cli("compose", "check", text, "--base", TINY, "--json")
    assert again.exit_code == code
    assert data(again)["ok"] is False
    assert "^" in data(again)["message"]


def test_recipes_are_expressions_too(cli: Run, store: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "both.yaml"
    recipe.write_text("add:\n  - {scale: 0.5, of: ns/a}\n  - {call: average, args: [ns/a, ns/b]}\n")
    found = data(cli("compose", "check", str(recipe), "--json"))
    assert found["normal"] == "0.5 * ns/a + average(ns/a, ns/b)"
    assert cli("compose", str(recipe), "-o", "ns/both@1.0.0").stdout == "ns/both@1.0.0\n"
    for text, says in (
        ("add: [ns/a", "is no recipe"),
        ("{ad: [ns/a]}", "recipe at $"),
        ("!!python/none x", "is no recipe"),
    ):
        recipe.write_text(text)
        wrong = cli("compose", "check", str(recipe))
        assert (wrong.exit_code, says in wrong.stderr) == (2, True), wrong.stderr


def test_check_finds_wrong_bases_and_tensors_before_loading(
    cli: Run, store: Any, stock: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "other")
    compose.save(stock.adapter("a"), tmp_path / "loose", model=stock.model)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("safetensors.torch.load_file", never)
    monkeypatch.setattr("compose.base.model.load_files", never)
    result = cli("compose", "check", "ns/i + ns/a", "--base", str(tmp_path / "other"))
    assert result.exit_code == 1
    assert "ns/i was made for builtin:tiny-lm" in result.stderr
    assert "another architecture" in result.stderr
    # a directory without a manifest says nothing of its base: its shapes do
    options = ("--adapter", f"x={tmp_path / 'loose'}")
    assert cli("compose", "check", "2 * x", "--base", TINY, *options).exit_code == 0
    result = cli("compose", "check", "2 * x", "--base", str(tmp_path / "other"), *options)
    assert result.exit_code == 1
    assert "q_proj" in result.stderr
    assert "\n      ^\n" in result.stderr


def test_explain_in_json(cli: Run, store: Any) -> None:
    text = "0.5 * ns/a + svd(ns/a, ns/b, rank=2) >> ns/q"
    found = data(cli("compose", "explain", text, "--quantize", "nf4", "--json"))
    assert found["expression"] == text
    assert found["base"]["name"] == TINY
    assert found["base"]["quantize"] == "nf4"
    members = {member["text"]: member for member in found["members"]}
    assert members.keys() == {"ns/a", "ns/b", "ns/q"}
    a = members["ns/a"]
    assert (a["ref"], a["digest"], a["kind"], a["rung"]) == ("ns/a@1.0.0", store.get("ns/a").digest, "lora", "exact")
    assert a["parameters"] == 2 * 4 * (192 + 192 + 192 + 64)  # two layers, r = 4, at q (192 -> 192) and v (192 -> 64)
    assert a["bytes"] == 4 * a["parameters"]
    assert a["flops"] == 2 * a["parameters"]  # each number is multiplied and added once for a token
    assert found["memory"]["adapters"] == sum(member["bytes"] for member in found["members"])
    assert found["memory"]["merged"] == 4 * 2 * (
        2 * (192 + 192 + 192 + 64) + 192 + 192 + 192 + 64
    )  # r = 2, three layers
    assert found["memory"]["total"] == sum(found["memory"][part] for part in ("base", "adapters", "merged"))
    assert found["relative_cost"] == pytest.approx(found["added_flops"] / found["base"]["flops"])
    assert {need["name"] for need in found["requires"]} == {"ns/a", "ns/b", "ns/q"}
    assert found["conflicts"] == [{"members": ["ns/a", "ns/b"], "sites": 4}]
    where = {step["operation"]: step["where"] for step in found["steps"]}
    assert where["merge"] == "at load, in parameter space: a new adapter of rank 2"
    assert where["load"] == "from the store"
    assert where["inject"] == "slots at 6 modules and the embedding"


def test_explain_as_text_and_as_a_graph(cli: Run, store: Any) -> None:
    text = cli("compose", "explain", "ns/a + ns/b >> ns/i").stdout
    for word in ("normal form:", "sha256:", "REQUIRES", "STEP", "memory: base", "cost:", "both act at 4 sites"):
        assert word in text
    dot = cli("compose", "explain", "ns/a + ns/b", "--format", "dot").stdout.splitlines()
    assert (dot[0], dot[-1]) == ("digraph composition {", "}")
    assert [line.strip() for line in dot if "->" in line] == ["0 -> 2;", "1 -> 2;", "2 -> 3;"]
    assert any('label="load\\nns/a\\n[lora]"' in line for line in dot)


@pytest.mark.parametrize("text", ["svd(ns/a, ns/b, rank=2)", "ties(ns/a, svd(ns/b, rank=1), rank=3)"])
def test_explain_measures_what_a_rank_leaves_out(text: str, cli: Run, store: Any) -> None:
    found = data(cli("compose", "explain", f"0.5 * {text}", "--json"))["certificates"]
    home = compose.load(TINY, "ns/a + ns/b", dtype="fp32")
    made = compose.merge(home, text)
    expected = {**made.inner, text: made.certificate}
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert not one.exact
        assert found[name]["discarded"] == pytest.approx(one.share, rel=1e-4)
        assert found[name]["sites"].keys() == one.sites.keys()
    shown = cli("compose", "explain", text).stdout
    assert "LEAVES OUT" in shown
    assert f"{100 * made.certificate.share:.2g}% of the energy" in shown


def test_explain_says_what_is_exact_and_what_only_loading_tells(cli: Run, store: Any) -> None:
    found = data(cli("compose", "explain", "ties(ns/a, ns/b)", "--json"))
    assert found["certificates"] == {"ties(ns/a, ns/b)": {"exact": True, "discarded": 0.0, "sites": {}}}
    assert found["memory"]["merged"] == 4 * 3 * 192 * (192 + 64)  # whole matrices: q and v of three layers
    assert "nothing: it is exact" in cli("compose", "explain", "ties(ns/a, ns/b)").stdout
    assert data(cli("compose", "explain", "average(ns/a, ns/b)", "--json"))["certificates"] == {}  # a weighted sum


def test_an_ensemble_costs_a_forward_a_member(cli: Run, store: Any) -> None:
    found = data(cli("compose", "explain", "ensemble.mean(ns/a, ns/i)", "--json"))
    assert found["relative_cost"] == pytest.approx(1, abs=0.05)
    assert found["steps"][-2]["where"].startswith("router: 2 rows")


# -- publishing ----------------------------------------------------------------------------------------------------


def test_publishing_from_the_command_line(cli: Run, store: Any, logits: Any) -> None:
    result = cli("compose", "ns/a >> 0.5 * ns/i", "-o", "ns/both@1.0.0", "--summary", "Both at once.")
    assert (result.exit_code, result.stdout) == (0, "ns/both@1.0.0\n")
    assert "requires ns/a>=1.0.0,<2" in result.stderr
    assert store.get("ns/both").manifest.summary == "Both at once."
    both = compose.load(TINY, "ns/both", dtype="fp32")
    assert torch.equal(logits(both), logits(compose.load(TINY, "ns/a >> 0.5 * ns/i", dtype="fp32")))
    merged = cli("compose", "average(ns/a, ns/b)", "--merge", "-o", "ns/mean@1.0.0", "--base", TINY, "--json")
    facts = data(merged)
    assert (facts["type"], facts["kind"]) == ("merge", "lora")
    assert facts["parents"] == ["ns/a@1.0.0", "ns/b@1.0.0"]
    assert facts["certificate"]["exact"] is True
    assert data(cli("show", "ns/mean", "--json"))["manifest"]["method"] == "average"
    small = cli("compose", "ns/a + ns/b", "--merge", "--rank", "2", "-o", "ns/small@1.0.0")
    assert "of the energy left out" in small.stderr
    again = cli("compose", "ns/b", "-o", "ns/both@1.0.0")
    assert (again.exit_code, "immutable" in again.stderr) == (1, True)


def test_a_merge_is_measured_on_texts(cli: Run, store: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the {word} of the law"}) + "\n" for word in ("text", "word", "end")))
    expr, digest = "regmean(ns/a, ns/b)", "sha256:" + hashlib.sha256(texts.read_bytes()).hexdigest()
    for words in (["--merge", "-o", "ns/near@1.0.0"], ["-o", "ns/both@1.0.0"]):  # a composition could never run
        refused = cli("compose", expr, *words)
        assert refused.exit_code == 1
        assert "regmean measures its adapters on data" in refused.stderr
    assert "merge" in cli("compose", "explain", expr).stdout
    each = [word for name in "ab" for word in ("--data", f"ns/{name}={texts}")]
    for name, given in {"near": ["--data", str(texts)], "each": each}.items():
        made = cli("compose", expr, "--merge", *given, "-o", f"ns/{name}@1.0.0")
        assert (made.exit_code, made.stdout) == (0, f"ns/{name}@1.0.0\n"), made.stderr
    assert store.get("ns/near").manifest.lineage.data == {"data": digest}
    assert store.get("ns/each").manifest.lineage.data == {"ns/a": digest, "ns/b": digest}
    assert cli("compose", "ns/a", "-o", "ns/c@1.0.0", "--data", str(texts)).exit_code == 2


# -- map -----------------------------------------------------------------------------------------------------------


def test_map_of_loras_needs_no_base(cli: Run, store: Any, stock: Any, tmp_path: Path) -> None:
    directory = compose.save(stock.adapter("a"), tmp_path / "copy", model=stock.model)
    fields = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "no/such-base"}))
    names = ("ns/a", "ns/b", str(directory))
    result = cli("compose", "map", *names, "--json", "--sites", "--svg", str(tmp_path / "map.svg"))
    found = data(result)
    assert found["names"] == list(names)
    cosine = torch.tensor(found["cosine"], dtype=torch.float64)
    assert torch.allclose(cosine, _cosines(stock, "a", "b", "a"), atol=1e-6)
    assert [(pair["a"], pair["b"]) for pair in found["duplicates"]] == [("ns/a", str(directory))]
    assert found["nearest"]["ns/a"][0]["name"] == str(directory)
    assert len(found["sites"]) == 6
    assert (tmp_path / "map.svg").read_text().lstrip().startswith("<?xml")
    text = cli("compose", "map", *names)
    assert "+1.000" in text.stdout
    assert "do the same" in text.stderr


def _cosines(stock: Any, *names: str) -> torch.Tensor:
    """From the deltas themselves, laid end to end."""
    rows = []
    for name in names:
        adapter = stock.adapter(name)
        deltas = {p: adapter.config.scale * adapter.at(p, "B") @ adapter.at(p, "A") for p in adapter.paths}
        parts = [
            (deltas[p] if p in deltas else torch.zeros(site.out_features, site.in_features)).flatten().double()
            for p, site in stock.model.moduloom.sites.sites.items()
        ]
        rows.append(torch.cat(parts))
    stacked = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    return stacked @ stacked.T


def test_map_of_other_kinds_uses_their_base(cli: Run, store: Any) -> None:
    found = data(cli("compose", "map", "ns/a", "ns/d", "ns/i", "--json"))
    assert [row[i] for i, row in enumerate(found["cosine"])] == pytest.approx([1, 1, 1])
    result = cli("compose", "map", "ns/a", "ns/n")
    assert (result.exit_code, "cannot be compared" in result.stderr) == (1, True)
    assert cli("compose", "map", "ns/a").exit_code == 2
    assert cli("compose", "map", "ns/a", "ns/a").exit_code == 2


# -- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_exits_by_what_it_finds(cli: Run, store: Any) -> None:
    cli("compose", "cat(ns/a, ns/b, weights=[0.5, -0.25])", "--merge", "-o", "ns/sum@1.0.0")
    sound = cli("compose", "doctor", "ns/sum", "--members", "ns/a", "ns/b", "--weights", "0.5", "-0.25")
    assert sound.exit_code == 0, sound.stdout + sound.stderr
    assert "(sound)" in sound.stdout
    wrong = cli("compose", "doctor", "--members", "ns/a", "ns/b", "--weights", "0.5", "0.5", "--json", "--", "ns/sum")
    assert wrong.exit_code == 1
    found = data(wrong)
    assert found["sound"] is False
    assert found["fitted"] == pytest.approx([0.5, -0.25])
    assert found["findings"] == ["it is the exact sum with other weights: 0.5, -0.25"]
    assert len(found["sites"]) == 6
    assert cli("compose", "doctor", "ns/sum", "--members", "ns/a", "--weights", "1", "2").exit_code == 2
    assert cli("compose", "doctor", "ns/sum").exit_code == 2
