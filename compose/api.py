"""The public functions of compose, over one transformers model.

>>> model = compose.load("builtin:tiny-lm", "0.5 * legal + code", quantize="nf4")
>>> compose.activate(model, ["legal", "code", None])      # one composition per row of the batch
>>> model.generate(**batch)                               # the transformers model itself, as ever
>>> compose.eject(model)                                  # bit for bit the base again
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from compose.algebra import ExprLike, as_rows
from compose.base import model as bases
from compose.base.compatibility import compare
from compose.expr.tree import Expr
from compose.formats import directory as interop
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import get_kind, make_config
from compose.planning.plan import Leaf, plan
from compose.planning.unfold import Resolved
from compose.runtime import model_runtime as inject
from compose.slots.gate import Gate, Mixer
from hub.manifest import BaseIdentity, Manifest
from hub.store import Artifact, Store

Source: TypeAlias = Adapter | Artifact | str | Path


def load(
    base: str | Path | PreTrainedModel,
    expr: ExprLike | Sequence[ExprLike] = None,
    *,
    quantize: str = "none",
    double_quant: bool = True,
    dtype: Any = None,
    device: Any = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    store: Store | None = None,
    adapters: Mapping[str, Source] | None = None,
    allow_base_drift: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a frozen base and make a composition of adapters active on it.

    Parameters
    ----------
    base
        ``builtin:tiny-lm``, a model directory, a Hugging Face id, or a model already loaded.
    expr
        What to apply: ``"a"``, ``"0.5 * a + b >> c"``, ``"average(a, b)"``, a list with one per row, or None.
        Leaves are names from ``adapters`` or refs found in ``store``.
    quantize
        ``none``, ``int8`` or ``nf4`` (bitsandbytes; nf4 with double quantization unless ``double_quant`` is false).
    task, labels
        Which head the base is loaded with (``causal_lm`` unless an adapter of the expression says otherwise).
    adapters
        Adapters by the name the expression uses: in memory, an artifact, a directory or a ref.
    allow_base_drift
        Accept an adapter trained on other weights of the same architecture.

    Returns
    -------
    The transformers model itself, in eval mode, with the base frozen.

    Raises
    ------
    HubError
        An unknown ref, another base, a kind the base cannot carry, an expression that does not parse: named, and
        before anything is changed.
    """
    one = expr is None or isinstance(expr, str | Expr)
    rows = as_rows(expr)
    sources = _Sources(dict(adapters or {}), store)
    known = bases.identity(base)
    plans = {
        row: plan(
            row,
            sources.resolve,
            check_base=lambda text, made_for: compare(made_for, known, ref=text, allow_drift=allow_base_drift),
            allow_base_drift=allow_base_drift,
        )
        for row in dict.fromkeys(rows)
    }
    leaves = {text: leaf for made in plans.values() for text, leaf in made.leaves.items()}
    if task is None:
        task, labels = task_of(leaves.values(), labels)
    model = bases.load_base(
        base,
        quantize=quantize,
        double_quant=double_quant,
        dtype=dtype,
        device=device,
        task=task,
        labels=labels,
        attn_implementation=attn_implementation,
    )
    for name in {**leaves, **sources.given}:
        attach(model, name, sources.source(name), store=store, allow_base_drift=allow_base_drift)
    composed = [plans[row].expression for row in rows]
    activate(model, composed[0] if one else composed)
    return model


class _Sources:
    """Where the leaves of an expression come from: given by name, or refs in the store."""

    def __init__(self, given: dict[str, Source], store: Store | None) -> None:
        self.given, self._store = given, store
        self._found: dict[str, Artifact] = {}

    def source(self, text: str) -> Source:
        """What :func:`attach` takes."""
        return self.given[text] if text in self.given else self._artifact(text)

    def resolve(self, text: str) -> Resolved:
        """What the plan needs to know of a leaf, from its manifest or config alone."""
        source = self.source(text)
        if isinstance(source, str | Path) and not Path(source).is_dir():
            source = self._artifact(str(source))
        if isinstance(source, Artifact):
            return source.manifest
        if isinstance(source, Adapter):
            return inject.leaf(source)
        kind, fields = interop.peek(source)
        return Leaf(kind, hyperparameters={"modules_to_save": fields.get("modules_to_save") or ()})

    def _artifact(self, text: str) -> Artifact:
        if text not in self._found:
            self._found[text] = (self._store or Store()).get(text)
        return self._found[text]


def task_of(leaves: Iterable[Resolved], labels: Sequence[str] | None) -> tuple[str | None, Sequence[str] | None]:
    """Task and labels that the adapters were trained for, if their manifests agree on one."""
    manifests = [leaf for leaf in leaves if isinstance(leaf, Manifest) and leaf.task]
    tasks = {m.task for m in manifests}
    if len(tasks) != 1:
        return None, labels
    known = {m.labels for m in manifests if m.labels}
    return tasks.pop(), labels or (known.pop() if len(known) == 1 else None)


def attach(
    model: PreTrainedModel, name: str, source: Source, *, store: Store | None = None, allow_base_drift: bool = False
) -> Adapter:
    """Make an adapter resident on ``model`` under ``name``, frozen and not yet active.

    ``source`` is an adapter in memory, a hub artifact, an adapter directory (ours or one saved by PEFT), or the text
    of a ref. An artifact's base is compared with the model's, tensor by tensor.

    Raises
    ------
    BaseMismatch
        The artifact was made for another base (see ``allow_base_drift``).
    KindError, NotFound, IntegrityError
        The files do not make an adapter of this base; the model is as before.
    """
    runtime = inject.runtime(model)
    if isinstance(source, Adapter):
        return runtime.add(name, source)
    if isinstance(source, str | Path) and Path(source).is_dir():
        return runtime.add(name, interop.read(source, runtime.sites, model, name=name))
    artifact = source if isinstance(source, Artifact) else (store or Store()).get(str(source))
    facts = artifact.manifest
    if facts.base is not None:
        bases.check(
            facts.base,
            model,
            trained_on=facts.trained_on,
            ref=str(artifact.ref),
            allow_drift=allow_base_drift,
        )
    kind, config = interop.parse_config(interop._json(artifact.file(interop.CONFIG)), runtime.sites)
    extra = artifact.file(interop.EXTRA) if interop.EXTRA in artifact.files else None
    tensors = interop.read_tensors(artifact.file(interop.WEIGHTS), extra)
    adapter = interop.build(kind, config, tensors, runtime.sites, model, name=name)
    adapter.labels = tuple(facts.labels)
    return runtime.add(name, adapter)


def create(
    model: PreTrainedModel,
    kind: str,
    config: Mapping[str, Any] | KindConfig | None = None,
    *,
    name: str,
    seed: int = 0,
) -> Adapter:
    """Make a new, trainable adapter of ``kind``, resident under ``name`` and not yet active.

    Raises
    ------
    KindError, SiteError
        An unknown kind or option (with a suggestion), or a kind that cannot work on this family.
    """
    cls = get_kind(kind)
    runtime = inject.runtime(model)
    return runtime.add(name, cls(make_config(cls, config), runtime.sites, model, name=name, seed=seed))


def activate(
    model: PreTrainedModel,
    expr: ExprLike | Sequence[ExprLike],
    *,
    weights: Mapping[str, float | Tensor] | None = None,
) -> None:
    """Make a composition of resident adapters active; None is the bare base.

    A list gives each row of the batch its own composition (a batch of k times as many rows repeats each entry k
    times in a row, as beams do). ``weights`` multiplies adapters by name: a number, one per row (B,), or one per
    token (B, T). What is active stays so if this raises.
    """
    inject.activate(model, expr, weights=weights)


def route(model: PreTrainedModel, experts: Sequence[ExprLike], gate: Gate | Mixer) -> None:
    """Make experts active whose weights ``gate`` computes at each site from what enters it, for each token.

    y = y0 + sum_e w_e(x) (f_e(x) - y0) with w = gate(path, x): (B, T, E) in the order of ``experts``, or 1 in place of
    B or T. An expert is the name of a resident adapter or an expression; None does nothing. Undone by the next
    ``activate``. What is active stays so if this raises.

    Raises
    ------
    KindError
        An expert with a prompt, a prefix or a head of its own: no weight at a site reaches those.
    """
    inject.route(model, experts, gate)


def detach(model: PreTrainedModel, name: str) -> None:
    """Let a resident adapter go; it must not be active."""
    inject.runtime(model).remove(name)


def eject(model: PreTrainedModel) -> None:
    """Restore modules, parameters and requires_grad flags exactly as they were before the first adapter."""
    inject.eject(model)


def identity(model: PreTrainedModel) -> BaseIdentity:
    """Identity of the frozen base: fingerprint of its unquantized weights, config and tokenizer."""
    return bases.identity(model)


def save(adapter: Adapter, directory: str | Path, *, model: PreTrainedModel, task: str | None = None) -> Path:
    """Write an adapter as a directory: config, ``adapter_model.safetensors`` and, with heads, ``extra.safetensors``.

    The directory is a PEFT directory where PEFT has the kind, and :func:`attach` reads it back exactly.
    """
    return interop.save(adapter, directory, inject.runtime(model).sites, base=bases.name_of(model), task=task)


def tokenizer(base: str | Path) -> Any:
    """Tokenizer of a base: ``builtin:``, a directory or a Hugging Face id."""
    return bases.tokenizer(base)
