"""What the guides take for granted, under the names they use: `prepare.py FOLDER` makes a home and a working folder.

FOLDER/home is a store with acme/law, acme/code, acme/mail, acme/tone, acme/desk (a router), me/mood (a classifier) and
quickstart/*, and knows a remote `team`; FOLDER/work holds the files and directories.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

BASE = "builtin:tiny-lm"
TEXTS = {
    "law": "The parties agree that clause {} of this licence is governed by the law of the land.",
    "code": "def answer_{0}(x):\n    return x + {0}",
    "mail": "Dear all, thank you for your mail number {}; I will answer tomorrow. Best wishes",
    "other": "On day {} the wind turned, and the ship came home with salt and oranges.",
}
REVIEWS = ("not a dull moment", "a fine film", "two hours of boredom", "a poor plot")
WORDS = "it was . , ! ? great terrible good bad fine poor film plot a not dull moment two hours of boredom".split()  # noqa: SIM905


def jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files(work: Path) -> None:
    """Rows and texts."""
    for name, text in TEXTS.items():
        jsonl(work / f"{name}.jsonl", [{"text": text.format(i)} for i in range(12)])
    for name in ("law", "code"):
        shutil.copy(work / f"{name}.jsonl", work / f"test-{name}.jsonl")
    (work / "letter.txt").write_text("\n".join(TEXTS["mail"].format(i) for i in range(4)))
    jsonl(work / "mails.jsonl", [{"text": TEXTS["mail"].format(i)} for i in range(3)])
    named = ("acme/law", "me/mood", "0.5 * acme/law + acme/tone")
    jsonl(work / "mixed.jsonl", [{"text": f"To be {i}", "adapter": name} for i, name in enumerate(named)])
    rows = [{"text": f"{REVIEWS[i % 4]} {i}", "label": ("good", "bad")[i % 4 // 2]} for i in range(64)]
    for name in ("train", "reviews"):
        jsonl(work / f"{name}.jsonl", rows)
    lines = [f'"{row["text"]}",{row["label"]}' for row in rows]
    (work / "reviews.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (work / "run.yaml").write_text(
        f"base: {BASE}\nmethod: lora\ntask: classification\ndata: {{eval: 0.25}}\nduration: 8\n"
    )


def adapters(work: Path) -> None:
    """LoRAs that do something, as directories and as artifacts."""
    import compose
    import hub

    model = compose.load(BASE)
    for seed, name in enumerate(("law", "code", "mail", "tone", "docs", "peft"), 1):
        adapter = compose.create(model, "lora", {"r": 4, "target_modules": "all-linear"}, name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        compose.save(adapter.freeze(), work / name, model=model)
    compose.save(compose.merge(model, "average(law, code)", name="merged").adapter, work / "merged", model=model)
    for name in ("law", "code", "mail", "tone"):
        version = "1.2.0" if name == "tone" else "1.0.0"
        hub.import_(work / name, name=f"acme/{name}", version=version, base=BASE, probe=name == "tone", license="MIT")
    for name in ("code", "docs"):
        hub.import_(work / name, name=f"quickstart/{name}", version="1.0.0", base=BASE)
    for name in ("docs", "mail"):
        shutil.rmtree(work / name)
    shutil.rmtree(work / "tone")
    hub.pull("acme/tone", out=work / "tone")  # with its module.json, and trained anew since
    weights = work / "tone" / "adapter_model.safetensors"
    shutil.copy(work / "peft" / weights.name, weights)


def bases(work: Path) -> None:
    """./gpt2 and ./bert: tiny random models with tokenizers."""
    import tokenizers
    from tokenizers import pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    import compose

    torch.manual_seed(0)
    tokenizer = compose.tokenizer(BASE)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(work / "gpt2")
    tokenizer.save_pretrained(work / "gpt2")

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    vocabulary = {word: i for i, word in enumerate((*special.values(), *WORDS))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(work / "bert")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(work / "bert")


def mood(work: Path) -> None:
    """me/mood: a classifier, trained for a moment."""
    import train

    config = {"base": BASE, "task": "classification", "data": {"train": str(work / "train.jsonl"), "eval": 0.25}}
    train.run({**config, "duration": 4}, folder=work / "mood-run", ref="me/mood")
    shutil.rmtree(work / "mood-run")


def desk() -> None:
    """acme/desk, which chooses between acme/law and acme/code."""
    import router

    router.fit(["acme/law", "acme/code"], "arrow", "acme/desk@1.0.0")


def remote(folder: Path) -> None:
    """The remote `team`, which has something already."""
    import hub

    hub.Remotes().add("team", str(folder / "team"))
    for name in ("acme/tone@1.2.0", "acme/law"):
        hub.push(name, to="team")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    os.environ["HUB_HOME"] = str(place / "home")
    (place / "work").mkdir(parents=True)
    files(place / "work")
    bases(place / "work")
    adapters(place / "work")
    mood(place / "work")
    desk()
    remote(place)
