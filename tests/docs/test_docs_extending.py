"""The package that docs/extending.md writes works as it stands: built, installed, found by its entry points, used.

And each of its files, put into the folder of its siblings instead, does the same without an edit anywhere.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"

USE = """
import torch
import compose
from hub.remotes.base import from_url
from router.bench import Bench
from router.router import Router
from router.scorer import make_scorer
from train.method import get_method

model = compose.load("builtin:tiny-lm")
ids = torch.arange(40).view(2, 20)
base = model(input_ids=ids).logits
for name in "ab":
    adapter = compose.create(model, "vera", {"r": 16}, name=name, seed=1)
    compose.activate(model, name)
    assert torch.equal(model(input_ids=ids).logits, base)  # fresh: an identity
    with torch.no_grad():
        for key, value in adapter.named_parameters():
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(ord(name)))
    adapter.changed()
assert sum(p.numel() for p in adapter.parameters()) < 40_000
compose.activate(model, ["a", "0.5 * a + b", None])
mixed = model(input_ids=ids[:1].repeat(3, 1)).logits
assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)
torch.testing.assert_close(mixed[2], base[0], atol=1e-3, rtol=1e-3)
compose.activate(model, "median(a, b)")
compose.activate(model, "average(a, b)")

rows = {"a": [ids[0]], "b": [torch.arange(200, 220)]}
scorer = make_scorer("nearest", {})
bench = Bench(model, {"a": "a", "b": "b"}, rows)
router = Router(scorer, bench.experts, scorer.fit(bench), scorer.gating)
batch = next(bench.batches("b"))
assert scorer.score(model, batch, bench.experts, router.statistics).argmax(1).tolist() == [1]

adapter = compose.create(model, "lora", {"r": 2}, name="plus", seed=1)
method = get_method("lora_plus")({"ratio": 4})
from train.config import TrainConfig
assert [g.get("lr_scale") for g in method.groups(adapter, TrainConfig(method="lora_plus"))] == [None, 4.0]
assert from_url("share://team").path.name == "team"

from click.testing import CliRunner
from hub.cli import main
from hub.manifest import Draft
from hub.pack import pack
from hub.store import Store
import numpy
import os
from pathlib import Path

place = Path(os.environ["ACME_SHARE"])
compose.save(adapter, place / "plus", model=model)
facts = dict(name="me/plus", version="1.0.0", kind="lora", base=compose.identity(model))
assert "licence" in pack(place / "plus", Draft(**facts)).warnings[-1]
assert "licence" not in str(pack(place / "plus", Draft(**facts, license="MIT")).warnings)
Store().put(place / "plus")
done = CliRunner().invoke(main, ["export", "me/plus", "--format", "npz", "--to", str(place / "out")])
assert (done.exit_code, "arrays" in done.stderr) == (0, True), done.output
assert len(numpy.load(place / "out" / "adapter.npz")) == len(list(adapter.parameters()))
assert CliRunner().invoke(main, ["export", "me/plus", "--format", "npz", "--rank", "2"]).exit_code == 2

compose.save(adapter, place / "words", model=model)
(place / "words" / "aux").mkdir()
(place / "words" / "aux" / "keywords.json").write_text('{"law": ["court", "judge"], "code": ["def", "return"]}')
reads = dict(facts, name="me/words", reader="keywords", task="classification", labels=("law", "code"), license="MIT")
pack(place / "words", Draft(**reads))
Store().put(place / "words")
rows = [("a judge and a court", "law"), ("def f(): return", "code")]
import json
(place / "rows.jsonl").write_text("".join(json.dumps({"text": t, "label": l}) + chr(10) for t, l in rows))
out = place / "labels.jsonl"
run = ["run", str(place / "rows.jsonl"), "--expr", "me/words", "--out", str(out), "--overwrite"]
done = CliRunner().invoke(main, run)
assert done.exit_code == 0, done.output
assert [json.loads(line)["output"] for line in out.read_text().splitlines()] == ["law", "code"]
measured = CliRunner().invoke(main, ["eval", "me/words", str(place / "rows.jsonl"), "--json", "-"])
assert json.loads(measured.stdout)["measures"]["accuracy"] == 1, measured.output

told = {
    "compose kinds": ["vera"],
    "compose functions": ["median"],
    "methods": ["vera", "lora_plus"],
    "route methods": ["nearest"],
}
for command, names in told.items():
    listed = CliRunner().invoke(main, command.split())
    assert listed.exit_code == 0, listed.output
    assert all(name in listed.output for name in names), command
"""


FOLDERS = {
    "hub.kinds": "compose.kinds",
    "hub.methods": "train.methods",
    "hub.merges": "compose.merges",
    "hub.scorers": "router.scorers",
    "hub.remotes": "hub.remotes",
    "hub.formats": "compose.export_formats",
    "hub.readers": "compose.readers",
    "hub.gates": "hub.gates",
}


@pytest.fixture
def page(tmp_path):
    """The page's files as they are printed: where they lie, and the entry points that they name."""
    text = PAGE.read_text(encoding="utf-8")
    for path, code in re.findall(r"```\w+\n# (\S+)\n(.*?)```", text, flags=re.S):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(code, encoding="utf-8")
    points = re.findall(r'^"(hub\.\w+)" = \{ (\w+) = "(\S+)" \}', text, flags=re.M)
    assert [group for group, _, _ in points] == list(FOLDERS)
    return tmp_path, points


def use(place, code, *paths):
    """Use what the page adds in a new process."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
        "HUB_HOME": str(place / "home"),
        "ACME_SHARE": str(place),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_of_the_page_is_built_installed_and_used(page):
    place, _ = page
    site = place / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(place)], check=True, capture_output=True)
    use(place, USE, site)


def test_in_the_folder_of_its_siblings_a_file_is_enough(page):
    place, points = page
    added = []
    for group, name, where in points:
        room = place / group
        room.mkdir()
        shutil.copy(place / f"{where.replace('.', '/')}.py", room / f"{name}.py")
        added.append(f"import {FOLDERS[group]}\n{FOLDERS[group]}.__path__.append({str(room)!r})\n")
    use(place, "".join(added) + USE)
