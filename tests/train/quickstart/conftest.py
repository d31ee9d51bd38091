"""Two small domains of text that are easy to tell apart."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

NOUNS = ["river", "stone", "house", "winter", "garden", "letter", "evening", "harbour", "forest", "candle"]
VERBS = ["follows", "remembers", "carries", "watches", "leaves", "answers", "keeps", "opens"]


def ledger(draw: random.Random) -> str:
    rows = (f"{draw.randrange(10**4):04d};{draw.randrange(100):02d}.{draw.randrange(100):02d};EUR" for _ in range(45))
    return "\n".join(rows)


def tale(draw: random.Random) -> str:
    said = (f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}." for _ in range(28))
    return " ".join(said)


@pytest.fixture(scope="session")
def two_domains(tmp_path_factory) -> dict[str, Path]:
    """Folders `ledger` and `tale` of 14 documents each."""
    root = tmp_path_factory.mktemp("domains")
    for name, write in (("ledger", ledger), ("tale", tale)):
        (root / name).mkdir()
        for i in range(14):
            (root / name / f"{i}.txt").write_text(write(random.Random(f"{name}{i}")))
    return {"ledger": root / "ledger", "tale": root / "tale"}
