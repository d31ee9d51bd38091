"""A SentenceTransformer whose last layer is the classifier's head: `SentenceTransformer(DIR).encode(texts)` is logits.

Four modules: the encoder with the adapter in its weights, the mean of its states, that mean made a unit vector, and
the head. `labels.json` names the columns. No classification model of transformers reads a unit mean state, so this is
where a plain head goes without loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from compose.api import activate, eject, tokenizer
from compose.artifacts.export_format import FORMATS, ExportFormat, Written
from compose.base.loading import quiet_transformers
from compose.errors import KindError
from compose.expr.tree import Ref
from compose.formats.files import write_tensors
from compose.merging.fold import fold, put
from compose.reader import open_reader

_MOST = 1e-4  # of a probability: beyond that the reader does more than its head says
_PROBES = [("a", None), ("one two three", None), ("What is it about?", None), ("It was not a dull moment. " * 4, None)]
_MODULES = ("Transformer", "Pooling", "Normalize", "Dense")
_PLACES = ("", "1_Pooling", "2_Normalize", "3_Dense")


@FORMATS.register("sentence_transformers")
class SentenceTransformer(ExportFormat):
    """What answers through a reader that is one linear head on unit mean states; anything else is refused by name.

    Measured: ``probabilities``, the largest difference between the reader's and the written model's on a few texts.
    """

    reads = True

    @torch.no_grad()
    def write(self, out: Path) -> Written:
        """Fold the adapter, compare with the reader, and save."""
        artifact = self.artifact
        if artifact.manifest.reader is None:
            raise KindError(
                f"{artifact.ref} has no reader, and with it no head on mean states",
                ref=artifact.ref,
                hint="--format merged makes a model of it",
            )
        reader = open_reader(artifact, self.where)
        head, told = reader.linear_head(), reader.scores(_PROBES)
        model, name = head.model, str(artifact.ref)
        folded = []
        if head.adapted:
            activate(model, name)
            folded = list(fold(model, Ref(name)))
        eject(model)
        put(model, folded)
        words = tokenizer(self.where)
        encoded = words([text for text, _ in _PROBES], padding=True, truncation=True, max_length=head.max_length,
                        return_tensors="pt")  # fmt: skip
        states = model.base_model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None].to(states.dtype)
        unit = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        logits = unit @ head.weight + head.bias
        said = {"classification": logits.softmax(-1), "regression": logits}.get(reader.task, logits.sigmoid())
        apart = float((said - told).abs().max())
        if apart > _MOST:
            raise KindError(
                f"{artifact.ref} is read in more ways than its head says: probabilities differ by {apart:.2g}",
                ref=artifact.ref,
                hint="serve it: hub serve BASE, POST /v1/classify",
            )
        with quiet_transformers():
            model.base_model.save_pretrained(out)
            words.save_pretrained(out)
        _write_modules(out, head, reader.labels)
        notes = [
            f'SentenceTransformer("DIR").encode(texts) gives a logit for each of {len(reader.labels)} labels, in the '
            "order of labels.json; their softmax is what `hub few-shot predict` says"
        ]
        return notes, {"probabilities": apart}


def _write_modules(out: Path, head: Any, labels: tuple[str, ...]) -> None:
    width, classes = head.weight.shape
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{name}"}
        for i, (name, place) in enumerate(zip(_MODULES, _PLACES, strict=True))
    ]
    _write(out / "modules.json", modules)
    _write(out / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None})
    _write(out / "sentence_bert_config.json", {"max_seq_length": head.max_length, "do_lower_case": False})
    _write(out / "labels.json", list(labels))
    _write(out / _PLACES[1] / "config.json", {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True})
    (out / _PLACES[2]).mkdir()
    dense = {"in_features": width, "out_features": classes, "bias": True}
    _write(out / _PLACES[3] / "config.json", {**dense, "activation_function": "torch.nn.modules.linear.Identity"})
    tensors = {"linear.weight": head.weight.T.contiguous(), "linear.bias": head.bias.contiguous()}
    write_tensors(out / _PLACES[3] / "model.safetensors", tensors)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
