"""The scripts and the notebook of examples/ run on the built-in base, offline, and say what they promise."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "two_adapters_one_batch": ["'The parties agree that this licence", "return 42"],
    "publish_and_pull": ["me/law@0.1.1 me/law@0.1.0 True", "module.json"],
    "merge_and_export": ["me/both@1.0.0 lora", "peft", "vllm"],
    "few_shot": ["contract -> law", "items] -> code"],
    "route_and_run": ["law", "licence is governed", "return 42"],
    "serve_and_call": ["me/law -> ' agree that this licence"],
    "tour": ["law -> 'The parties agree that this licence", "me/code", "True me/", "True"],
}


def test_every_example_is_run():
    here = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} - {"small"}
    assert here == set(SAID)


@pytest.mark.parametrize("name", [name for name in SAID if name != "tour"])
def test_a_script_runs(desk, name):
    lines = [line for line in (EXAMPLES / f"{name}.py").read_text().splitlines() if line]
    assert len(lines) <= 40, "an example is read at a glance"
    said = desk.run(EXAMPLES / f"{name}.py", cwd=desk.folder() / "work")
    assert not [text for text in SAID[name] if text not in said], said


def test_the_notebook_runs(desk):
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs are not kept"
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    work = desk.folder() / "work"
    (work / "tour.py").write_text(f"import sys\n\nsys.path.insert(0, {str(EXAMPLES)!r})\n{code}\n")
    said = desk.run(work / "tour.py", cwd=work)
    assert not [text for text in SAID["tour"] if text not in said], said
