"""Small adapters for the other examples: each learns one sentence for a moment, and is published into the store."""

import tempfile
from pathlib import Path

import train
from hub import Artifact

SENTENCES = {
    "me/law": "The parties agree that this licence is governed by the law of the land.",
    "me/code": "def answer(question):\n    return 42  # of course",
}


def adapter(name: str) -> Artifact:
    """A LoRA that has learned the sentence of ``name``, as the next version of it in the store."""
    with tempfile.TemporaryDirectory() as room:
        text = Path(room) / "text.txt"
        text.write_text((SENTENCES[name] + "\n") * 40)
        config = {"data": {"train": str(text)}, "duration": 20, "max_length": 32, "batch_size": 4, "lr": 1e-2}
        outcome = train.run(config, ref=name, folder=Path(room) / "run")
    assert outcome.artifact is not None
    return outcome.artifact
