"""Publish two versions to a shared place, and pull by range and by alias into another store: every byte is checked."""

import tempfile
from pathlib import Path

from small import adapter

import hub

with tempfile.TemporaryDirectory() as place:
    team, elsewhere = str(Path(place) / "team"), hub.Store(Path(place) / "elsewhere")
    hub.push(str(adapter("me/law").ref), to=team, tag="prod")
    hub.push(str(adapter("me/law").ref), to=team)

    newest = hub.pull("me/law>=0.1,<1", from_=team, store=elsewhere, out=Path(place) / "law")
    trusted = hub.pull("me/law@prod", from_=team, store=elsewhere)
    print(newest.ref, trusted.ref, hub.verify("me/law@prod", store=elsewhere).ok)
    print(sorted(path.name for path in (Path(place) / "law").iterdir()))
