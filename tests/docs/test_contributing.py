"""Every file that CONTRIBUTING names is there, with the siblings it speaks of."""

import re

from pages import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAMED = [span for span in re.findall(r"`([\w./-]+)`", TEXT) if "/" in span or span.endswith((".py", ".md", ".toml"))]


def test_every_named_file_is_there():
    assert len(NAMED) > 40
    bare = ("scorer.py", "method.py", "scorers/", "methods/", "kind/", "kinds/", "commands/", "site/", "module.json")
    assert not [name for name in NAMED if "NAME" not in name and name not in bare and not (ROOT / name).exists()]


def test_a_new_file_has_its_folder_and_a_sibling_to_look_at():
    rows = [line for line in TEXT.splitlines() if "NAME.py" in line]
    assert len(rows) >= 8
    for row in rows:
        new, like = re.findall(r"`([\w/]+\.py)`", row)
        assert new.rpartition("/")[0] == like.rpartition("/")[0], row
