"""Fit a router on what two adapters were made for, and run a file of mixed rows: each row finds its adapter."""

import json
import tempfile
from pathlib import Path

from small import SENTENCES, adapter

import router

for name in SENTENCES:
    adapter(name)
texts = {"law": [SENTENCES["me/law"]] * 4, "code": [SENTENCES["me/code"]] * 4}
fitted = router.fit(["me/law", "me/code"], "discriminant", "me/desk@1.0.0", data=texts)
print(router.explain("me/desk", "The parties agree").best)

with tempfile.TemporaryDirectory() as place:
    rows, answers = Path(place) / "rows.jsonl", Path(place) / "answers.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("The parties", "def answer", "This licence"))
    )
    router.run(rows, answers, adapter=str(fitted.ref), route_weights=True, max_new_tokens=12)
    print(answers.read_text())
