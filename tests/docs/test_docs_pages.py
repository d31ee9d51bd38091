"""README and the guides run as printed; whatever they print as a command exists."""

import re
from functools import cache
from pathlib import Path

import pytest
from pages import ROOT, SHELL, blocks, commands, inline, problem

GUIDES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in ("cli.md", "coverage.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]


def runs(block):
    """Whether a block is run."""
    return block.needs is None and block.language in ("python", *SHELL)


RUNS = [page for page in PAGES if any(runs(block) for block in blocks(page.read_text()))]


@pytest.mark.parametrize("page", RUNS, ids=lambda page: page.name)
def test_the_page_runs_as_printed(desk, page):
    said = desk.run(Path(__file__).parent / "run_page.py", page, cwd=desk.folder() / "work")
    assert said.count(f"{page.name}:") >= len(blocks(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_exists(desk, page):
    @cache
    def help_of(script):
        return desk.run(script, "--help", cwd=desk.room / "prepared" / "work")

    text = page.read_text(encoding="utf-8")
    printed = [block.text for block in blocks(text) if block.language in SHELL]
    found = [words for part in (*printed, *inline(text)) for words in commands(part)]
    wrong = {" ".join(words): problem(words, help_of) for words in found if words[0] in ("hub", "python", "make")}
    assert not {command: why for command, why in wrong.items() if why}


def test_examples_in_help_exist():
    lines = [line.strip() for line in (ROOT / "docs" / "cli.md").read_text().splitlines() if line.startswith("  hub ")]
    assert len(lines) > 60
    told = [re.split(r" {2,}", line)[0] for line in lines]  # without what is said beside it
    wrong = {line: problem(words) for line in told for words in commands(line) if words[0] == "hub"}
    assert not {line: why for line, why in wrong.items() if why}


def test_what_does_not_exist_is_found():
    assert problem(["hub", "pushh", "x"]) == "hub has no pushh"
    assert problem(["hub", "push", "x", "--too", "y"]) == "hub push has no --too"
    assert problem(["hub", "compose", "a + b", "-o", "x/y@1"]) is None
    assert problem(["make", "nothing"]) and problem(["python", "tests/none.py"])


def test_only_what_lies_outside_is_not_run():
    needs = [(page.name, block.needs) for page in PAGES for block in blocks(page.read_text()) if block.needs]
    assert len(needs) <= 3, needs  # packages from an index, data sets: nothing that a test could make
