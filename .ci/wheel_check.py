"""Train, save, attach and compose on the built-in base: run with the installed wheel, away from the sources."""

import sys
import tempfile
from pathlib import Path

import torch

import compose

if "site-packages" not in compose.__file__:
    raise SystemExit(f"compose came from {compose.__file__}, not from the wheel")
model = compose.load("builtin:tiny-lm", quantize="nf4")
tokenizer = compose.tokenizer("builtin:tiny-lm")
batch = tokenizer(["def main():", "The licence says"], return_tensors="pt", padding=True)
with torch.no_grad():
    base = model(**batch).logits
adapter = compose.create(model, "lora", {"target_modules": "all-linear"}, name="a", seed=1)
compose.activate(model, "a")
model(**batch, labels=batch["input_ids"]).loss.backward()
for parameter in adapter.parameters():
    parameter.data -= parameter.grad
adapter.freeze()
with tempfile.TemporaryDirectory() as folder:
    compose.save(adapter, folder, model=model)
    compose.attach(model, "b", Path(folder))
with torch.no_grad():
    compose.activate(model, ["b", None])
    mixed = model(**batch).logits
    compose.eject(model)
    after = model(**batch).logits
if not torch.equal(base, after):
    raise SystemExit("eject did not restore the base")
if not torch.allclose(mixed[1], base[1]) or torch.allclose(mixed[0], base[0]):
    raise SystemExit("a mixed batch does not keep its rows apart")
sys.stdout.write("the wheel trains, saves, attaches, mixes and ejects\n")
