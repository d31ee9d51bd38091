"""Merge two adapters into one, see what that loses, and hand the result to PEFT and to vLLM."""

import tempfile
from pathlib import Path

from small import adapter

import compose

law, code = adapter("me/law").ref, adapter("me/code").ref

merged, made = compose.publish_merge(f"ties({law}, {code}, density=0.5)", "me/both@1.0.0", rank=8)
print(merged.ref, merged.manifest.kind, made.certificate)

with tempfile.TemporaryDirectory() as place:
    for format in ("peft", "vllm"):
        done = compose.export("me/both", format, Path(place) / format)
        print(done.directory, *done.notes)
