"""Artifacts that answer through a reader: each on the base as it was saved, beside the one that the engine runs.

An engine holds an encoder without its language-modelling head, which a reader wants, and lays out what is active on it
for rows of many adapters. So readers have a model of their own, made at the first of them, whose weights are the
engine's own wherever the two are equal: what it costs is the head and what readers bring.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.reader import READERS, Reader, ReaderText
from hub.errors import UsageError
from hub.store import Artifact
from router.engine.host import Host


@dataclass(frozen=True)
class Scored:
    """What a reader says of a text: its labels by the reader's own rule, and (C,) scores."""

    labels: tuple[str, ...]
    scores: Tensor


class Readers:
    """The readers that are open, as many as a budget of bytes holds: least recently used goes first.

    From any thread; one at a time computes.
    """

    def __init__(self, host: Host, *, budget: int | None = None) -> None:
        self._host, self.budget = host, budget
        self._lock = RLock()
        self._bases: dict[type[Reader], PreTrainedModel] = {}
        self._open: OrderedDict[str, Reader] = OrderedDict()

    def get(self, artifact: Artifact) -> Reader:
        """The reader of an artifact.

        Raises
        ------
        HubError
            What its files or the base are refused for; an engine whose base is quantized, or was given in memory.
        """
        with self._lock:
            found = self._open.pop(artifact.digest, None)
            if found is None:
                kind = READERS.get(str(artifact.manifest.reader))
                found = kind.open(artifact, self._base(kind, artifact), self._host.tokenizer, name=str(artifact.ref))
            self._open[artifact.digest] = found
            while self.budget is not None and len(self._open) > 1 and self.bytes > self.budget:
                self._open.pop(next(iter(self._open))).close()
            return found

    def read(self, artifact: Artifact, texts: Sequence[ReaderText]) -> list[Scored]:
        """What the reader of an artifact says of texts. Raises as :meth:`get`, and what the reader refuses."""
        with self._lock:
            reader = self.get(artifact)
            # What is active is laid out for this call and others, so nothing of it may be an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                scores = reader.scores(texts)
            return [Scored(reader.chosen(row), row) for row in scores]

    @property
    def bytes(self) -> int:
        """Of the tensors of the readers that are open."""
        return sum(reader.bytes for reader in self._open.values())

    def _base(self, kind: type[Reader], artifact: Artifact) -> PreTrainedModel:
        if kind not in self._bases:
            host = self._host
            if host.given is None:
                why = "the base of this engine was given in memory"
                hint = "Engine(directory_or_id), or few_shot.load"
            elif host.quantized:
                why, hint = f"this engine holds its base as {host.held}", "leave --quantize out"
            else:
                self._bases[kind] = _sharing(kind.load_base(host.given, device=host.model.device), host.model)
                return self._bases[kind]
            raise UsageError(
                f"{artifact.ref} reads the base as it was saved, by its reader {artifact.manifest.reader}, and {why}",
                ref=artifact.ref,
                hint=hint,
            )
        return self._bases[kind]


def _sharing(model: PreTrainedModel, host: PreTrainedModel) -> PreTrainedModel:
    """The model with the host's tensors where it has equal ones of the same name."""
    theirs = dict(host.named_parameters())
    for name, parameter in model.named_parameters():
        other = theirs.get(name)
        same = other is not None and (other.shape, other.dtype) == (parameter.shape, parameter.dtype)
        if same and other is not None and torch.equal(other, parameter):
            parameter.data = other.data
    return model
