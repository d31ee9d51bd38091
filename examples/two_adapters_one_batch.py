"""Two adapters in one batch on a 4-bit base: each row has its own, and the last one has none."""

from small import adapter

import compose

adapter("me/law")
adapter("me/code")

model = compose.load("builtin:tiny-lm", quantize="nf4", adapters={"law": "me/law", "code": "me/code"})
tokenizer = compose.tokenizer("builtin:tiny-lm")
prompts = ["The parties", "def answer", "The parties"]
batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")

compose.activate(model, ["law", "0.5 * law + code", None])
answers = model.generate(**batch, max_new_tokens=12, do_sample=False)
for text in tokenizer.batch_decode(answers, skip_special_tokens=True):
    print(repr(text))
