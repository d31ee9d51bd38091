"""What is named by a string, so that naming it costs nothing, is there."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import hub

ROOT = Path(hub.__file__).parents[1]
PACKAGES = ("hub", "compose", "router", "train")
TARGET = re.compile(rf'"((?:{"|".join(PACKAGES)})(?:\.\w+)+):(\w+)"')
TARGETS = sorted(
    {
        match.groups()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for match in TARGET.finditer(path.read_text())
    }
)


def test_there_are_some() -> None:
    assert ("compose.artifacts.importing", "convert") in TARGETS
    assert len(TARGETS) > 30


@pytest.mark.parametrize(("module", "name"), TARGETS)
def test_a_target_in_a_string_is_there(module: str, name: str) -> None:
    assert hasattr(import_module(module), name)
