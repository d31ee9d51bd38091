"""Behavioural probes: what an adapter did to a few token sequences at its author's, and whether it does so here.

A probe is a sequence of random tokens (so no text of anybody's is published), the k largest logits of the adapted
model at its last position, and the base's logits at the same entries. What is compared is the *effect* of the adapter,

    e = adapted - base,    error = ||e_here - e_there|| / ||e_there||,

against a tolerance that the author measured: how far the same probes differ there, run one by one instead of together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from compose.base.at_hand import at_hand
from compose.base.quantization import quantization_of
from compose.base.text_config import text_config
from compose.expr.tree import Ref
from compose.formats.directory import read_adapter
from compose.formats.files import write_tensors
from compose.kind.adapter import Adapter
from compose.runtime.model_runtime import activate, runtime
from compose.runtime.row_trials import FAILURES
from hub.contents.tensor_files import read_header
from hub.errors import GateError, NotFound
from hub.store import Artifact, Store

__all__ = ["FILE", "Outcome", "check", "record", "record_directory", "write"]

FILE = "probes.safetensors"
PROBES, TOKENS, ENTRIES = 4, 12, 16
_MOST = 2**20  # bytes of a file from outside
_LEAST = {torch.float32: 1e-2, torch.float64: 1e-2}  # tolerance where nothing is rounded but sums; else 5e-2
_WEAK = 1e-4  # an effect below this share of the logits is measured against that instead


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes
    ----------
    error
        ||e_here - e_there|| / ||e_there||, the adapter's effect here against that at its author's.
    base_error
        The same for the logits of the bare base.
    tolerance
        What the author has measured, or more where numbers are rounded.
    held
        How the base is held here: ``none``, ``int8``, ``nf4``.
    """

    ref: str
    base: str
    held: str
    probes: int
    error: float
    base_error: float
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether the adapter does here what it did at its author's."""
        return self.error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "same": self.same}

    def __str__(self) -> str:
        verdict = "does here what it did at its author's" if self.same else "does not do here what it did there"
        base = "" if self.same else f"; the bare base differs by {self.base_error:.2g}"
        return (
            f"{verdict}: its effect on {self.base} (held as {self.held}) differs by {self.error:.2g} "
            f"in {self.probes} probes, tolerance {self.tolerance:.2g}{base}"
        )


@torch.no_grad()
def record(model: PreTrainedModel, adapter: Adapter) -> dict[str, Tensor] | None:
    """Probe an adapter on the model it belongs to; None for a model that does not make logits of a text alone.

    Returns
    -------
    ``input_ids`` (P, T), ``entries``, ``base``, ``adapted`` (P, k) and ``tolerance`` (1,): what :func:`write` writes.
    What was active on the model is active again.
    """
    if model.main_input_name != "input_ids" or runtime(model).sites.input_table is None:
        return None
    ids = tokens(model)
    with _trial(model, adapter) as name:
        try:
            base = _active(model, ids, None)
        except FAILURES:  # it asks for more: images beside the text
            return None
        adapted = _active(model, ids, name)
        entries = adapted.topk(min(ENTRIES, adapted.shape[-1])).indices  # (P, k)
        alone = [_active(model, row[None], ref) for ref in (name, None) for row in ids]
    effect = (adapted - base).gather(1, entries)
    again = (torch.cat(alone[: len(ids)]) - torch.cat(alone[len(ids) :])).gather(1, entries)
    answers = {"entries": entries, "base": base.gather(1, entries), "adapted": adapted.gather(1, entries)}
    noise = relative_error(again, effect, answers["adapted"])
    least = _LEAST.get(model.dtype, 5e-2) if quantization_of(model) == "none" else 5e-2
    return {"input_ids": ids, **answers, "tolerance": torch.tensor([max(least, min(8 * noise, 0.5))])}


def write(directory: Path, probes: Mapping[str, Tensor] | None) -> None:
    """Put probes into an artifact directory, before it is packed; nothing where there are none."""
    if probes is not None:
        write_tensors(directory / FILE, probes)


def record_directory(directory: Path, *, base: str | Path, task: str | None = None, labels: Sequence[str] = ()) -> None:
    """Probe the adapter of a directory on a base and put the probes beside it."""
    from compose.base.model import load_base

    model = load_base(base, task=task, labels=tuple(labels) or None)
    adapter = read_adapter(directory, runtime(model).sites, model, name="probed")
    write(directory, record(model, adapter))


@torch.no_grad()
def check(
    ref: str,
    *,
    store: Store | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    allow_base_drift: bool = False,
) -> Outcome:
    """Run the probes of an artifact on a base of this machine.

    Parameters
    ----------
    base
        As for :func:`compose.load`; default: the one it was made for.
    quantize
        How to hold it; default: as its author did.
    allow_base_drift
        Accept other weights of the same architecture: the probes then say what that does.

    Raises
    ------
    NotFound
        It was published without probes, or its base is not at hand.
    BaseMismatch, GateError
        Another base; probes that do not fit it.
    """
    from compose.api import load

    artifact = (store or Store()).get(ref)
    probes = _read(artifact)
    facts = artifact.manifest
    where = base or (at_hand(facts.base) if facts.base else None)
    if where is None:
        raise NotFound(f"{artifact.ref} names no base to run on", ref=artifact.ref, hint="give --base BASE")
    trained_on = facts.trained_on
    model = load(
        where,
        str(artifact.ref),
        quantize=quantize or (trained_on.quantization if trained_on else "none"),
        double_quant=trained_on.double_quant is not False if trained_on else True,
        dtype=getattr(torch, trained_on.compute_dtype, None) if trained_on and trained_on.compute_dtype else None,
        store=store,
        allow_base_drift=allow_base_drift,
    )
    ids, entries = probes["input_ids"], probes["entries"]
    words = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= words or int(ids.min()) < 0:
        raise GateError(f"the probes of {artifact.ref} hold tokens that this base of {words} does not know")
    adapted, bare = _active(model, ids, str(artifact.ref)), _active(model, ids, None)
    if int(entries.max()) >= adapted.shape[-1] or int(entries.min()) < 0:
        raise GateError(f"the probes of {artifact.ref} look at logits that this base does not have")
    here, base_here = (adapted - bare).gather(1, entries), bare.gather(1, entries)
    there = probes["adapted"] - probes["base"]
    return Outcome(
        ref=str(artifact.ref),
        base=str(where),
        held=quantization_of(model),
        probes=len(ids),
        error=relative_error(here, there, probes["adapted"]),
        base_error=relative_error(base_here, probes["base"], probes["base"]),
        tolerance=float(probes["tolerance"]),
    )


def tokens(model: PreTrainedModel) -> Tensor:
    """(P, T) random tokens, none of them special; the same ones for every base of one vocabulary.

    An encoder-decoder that classifies looks at the end of the text, so there the last token is that.
    """
    config = text_config(model.config)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")}
    words = model.get_input_embeddings().weight.shape[0]
    plain = torch.tensor([i for i in range(words) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    ids = plain[torch.randint(len(plain), (PROBES, TOKENS), generator=generator)]
    if config.is_encoder_decoder and not model.can_generate() and config.eos_token_id is not None:
        ids[:, -1] = config.eos_token_id
    return ids


def _active(model: PreTrainedModel, ids: Tensor, name: str | None) -> Tensor:
    """:func:`logits` of one resident adapter, or of the bare base."""
    activate(model, None if name is None else Ref(name))
    return logits(model, ids)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (P, V) at the last position, or of the classes (P, C), in float32 on the CPU."""
    ids = ids.to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder and model.can_generate():
        inputs["decoder_input_ids"] = ids[:, :4]
    out: Tensor = model(**inputs).logits
    return (out[:, -1] if out.dim() == 3 else out).float().cpu()


def relative_error(here: Tensor, there: Tensor, scale: Tensor) -> float:
    """`||here - there|| / ||there||`, or over a ten-thousandth of `||scale||` where that is more."""
    least = _WEAK * float(torch.linalg.vector_norm(scale))
    return float(torch.linalg.vector_norm(here - there)) / max(float(torch.linalg.vector_norm(there)), least, 1e-12)


@contextmanager
def _trial(model: PreTrainedModel, adapter: Adapter) -> Iterator[str]:
    """The adapter resident in eval mode; model and adapter are as before afterwards."""
    home = runtime(model)
    resident, name, training = home.adapters.get(adapter.name) is adapter, adapter.name, model.training
    rows, weights, routing = home.rows, home.weights, home.routing
    if not resident:
        home.add("probed", adapter)
    model.eval()
    try:
        yield adapter.name
    finally:
        model.train(training)
        home.activate(rows, weights, routing)
        if not resident:
            home.remove("probed")
            adapter.name = name


def _read(artifact: Artifact) -> dict[str, Tensor]:
    """Probes of an artifact; their sizes are looked at before they are read."""
    if FILE not in artifact.files:
        raise NotFound(
            f"{artifact.ref} was published without probes, so what it did at its author's is not known",
            ref=artifact.ref,
            path=FILE,
            hint="`hub train` publishes probes, and `hub import --probe` records them",
        )
    path = artifact.file(FILE)
    header = {info.name: (info.shape, info.dtype) for info in read_header(path).tensors}
    ids, entries = header.get("input_ids", ((), "")), header.get("entries", ((), ""))
    wanted = {
        "input_ids": (ids[0], "I64"),
        "entries": (entries[0], "I64"),
        "base": (entries[0], "F32"),
        "adapted": (entries[0], "F32"),
        "tolerance": ((1,), "F32"),
    }
    pairs = len(ids[0]) == len(entries[0]) == 2 and ids[0][0] == entries[0][0] > 0 and entries[0][1] > 0 < ids[0][1]
    small = path.stat().st_size <= _MOST
    if header != wanted or not pairs or not small:
        raise GateError(f"{FILE} of {artifact.ref} does not hold probes as they are written here", ref=artifact.ref)
    read: dict[str, Tensor] = load_file(path)
    return read
