"""A classifier from four rows a class: learned in seconds, published, and asked."""

import json
import tempfile
from pathlib import Path

import train

LAW = ["The court shall hear both parties", "The contract ends with the year"]
LAW += ["This licence is governed by law", "Each party may terminate this agreement"]
CODE = ["def f(x): return x + 1", "for i in range(10): print(i)", "import os; os.getcwd()", "class Point: pass"]
rows = [{"text": text, "label": label} for label, texts in (("law", LAW), ("code", CODE)) for text in texts]

with tempfile.TemporaryDirectory() as place:
    data = Path(place) / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    train.few_shot(str(data), "builtin:tiny-lm", method="feature", publish="me/what")

texts = ["The parties agree to this contract", "return [x for x in items]"]
for text, label in zip(texts, train.fewshot.load("me/what").predict(texts), strict=True):
    print(text, "->", label)
