"""The public functions of compose, over one transformers model.

>>> model = compose.load("builtin:tiny-lm", "0.5 * legal + code", quantize="nf4")
>>> compose.activate(model, ["legal", "code", None])      # one composition per row of the batch
>>> model.generate(**batch)                               # the transformers model itself, as ever
>>> compose.eject(model)                                  # bit for bit the base again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compose.algebra import ExprLike, as_rows
from compose.base.compatibility import compare
from compose.base.model import check_base, identity_of, known_identity, load_base, name_of, tokenizer_of
from compose.expr.tree import Expr
from compose.formats.directory import read_adapter, save_adapter
from compose.formats.peft_models import on_disk
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.registry import get_kind, make_config
from compose.planning.members import AdapterFinder, AdapterSource, manifest_of, task_of
from compose.planning.plan import plan
from compose.runtime import model_runtime
from compose.runtime.activation import Activation
from compose.runtime.model_runtime import Runtime, runtime
from compose.slots.gate import Gate, Mixer
from hub.manifest import BaseIdentity
from hub.store import Artifact, Store


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
    adapters: Mapping[str, AdapterSource] | None = None,
    allow_base_drift: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a frozen base and make a composition of adapters active on it.

    Parameters
    ----------
    base
        ``builtin:tiny-lm``, a model directory, a Hugging Face id, or a model already loaded (compiled or wrapped, too:
        that is what is returned then).
    expr
        What to apply: ``"a"``, ``"0.5 * a + b >> c"``, ``"average(a, b)"``, a list with one per row, or None.
        Leaves are names from ``adapters`` or refs found in ``store``.
    quantize
        ``none``, ``int8`` or ``nf4`` (bitsandbytes; nf4 with double quantization unless ``double_quant`` is false).
    task, labels
        Which head the base is loaded with (``causal_lm`` unless an adapter of the expression says otherwise).
    adapters
        Adapters by the name the expression uses: in memory, an artifact, a directory, a ref or a PeftModel.
    allow_base_drift
        Accept an adapter trained on other weights of the same architecture, and a quantized model of unknown origin.

    Returns
    -------
    The transformers model itself, in eval mode, with the base frozen.

    Raises
    ------
    HubError
        An unknown ref, another base, a kind the base cannot carry, an expression that does not parse: named, and
        before anything is changed.
    """
    with on_disk(adapters or {}) as sources:
        model = _load(
            base,
            expr,
            AdapterFinder(store, sources),
            allow_base_drift,
            quantize=quantize,
            double_quant=double_quant,
            dtype=dtype,
            device=device,
            task=task,
            labels=labels,
            attn_implementation=attn_implementation,
        )
    return model if isinstance(base, str | Path) else base


def _load(
    base: str | Path | PreTrainedModel,
    expr: ExprLike | Sequence[ExprLike],
    finder: AdapterFinder,
    allow_base_drift: bool,
    *,
    task: str | None,
    labels: Sequence[str] | None,
    **options: Any,
) -> PreTrainedModel:
    one = expr is None or isinstance(expr, str | Expr)
    rows = as_rows(expr)
    known = known_identity(base, allow_drift=allow_base_drift)
    plans = {
        row: plan(
            row,
            finder.resolve,
            check_base=lambda text, made_for: (
                None if known is None else compare(made_for, known, ref=text, allow_drift=allow_base_drift)
            ),
            allow_base_drift=allow_base_drift,
        )
        for row in dict.fromkeys(rows)
    }
    leaves = {text: leaf for made in plans.values() for text, leaf in made.leaves.items()}
    if task is None and isinstance(base, str | Path):  # a model in memory has its task
        task, labels = task_of(leaves.values(), labels)
    model = load_base(base, task=task, labels=labels, **options)
    for name in {**leaves, **finder.given}:
        attach(model, name, finder.source(name), allow_base_drift=allow_base_drift)
    composed = [plans[row].expression for row in rows]
    activate(model, composed[0] if one else composed)
    return model


def attach(
    model: PreTrainedModel,
    name: str,
    source: AdapterSource,
    *,
    store: Store | None = None,
    allow_base_drift: bool = False,
) -> Adapter:
    """Make an adapter resident on ``model`` under ``name``, frozen and not yet active.

    ``source`` is an adapter in memory, a hub artifact, an adapter directory (ours or one saved by PEFT), the text of a
    ref, or a PeftModel, whose active adapter is read. An artifact's base is compared with the model's, tensor by
    tensor.

    Raises
    ------
    BaseMismatch
        The artifact was made for another base (see ``allow_base_drift``).
    KindError, NotFound, IntegrityError
        The files do not make an adapter of this base; the model is as before.
    """
    home = runtime(model)
    with on_disk({name: source}) as sources:
        return _attach(home, name, AdapterFinder(store, sources).source(name), allow_base_drift)


def _attach(home: Runtime, name: str, where: Adapter | Artifact | Path, allow_base_drift: bool) -> Adapter:
    model = home.model
    if isinstance(where, Adapter):
        return home.add(name, where)
    manifest = manifest_of(where)
    if manifest is not None and manifest.base is not None:
        check_base(
            manifest.base,
            model,
            trained_on=manifest.trained_on,
            ref=str(where.ref if isinstance(where, Artifact) else where),
            allow_drift=allow_base_drift,
        )
    adapter = read_adapter(where, home.sites, model, name=name)
    adapter.labels = tuple(manifest.labels) if manifest is not None else ()
    return home.add(name, adapter)


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
    home = runtime(model)
    return home.add(name, cls(make_config(cls, config), home.sites, model, name=name, seed=seed))


def activate(
    model: PreTrainedModel,
    expr: ExprLike | Sequence[ExprLike],
    *,
    weights: Mapping[str, float | Tensor] | None = None,
) -> Activation:
    """Make a composition of resident adapters active; None is the bare base.

    A list gives each row of the batch its own composition (a batch of k times as many rows repeats each entry k
    times in a row, as beams do). ``weights`` multiplies adapters by name: a number, one per row (B,), or one per
    token (B, T). What is active stays so if this raises.

    Returns
    -------
    The merges that were carried out, each with the certificate of what it has lost: nothing, unless a rank was asked
    for (``ties(a, b, rank=8)``) or a merge is too large to be held whole, of which a MergeWarning tells.
    """
    return model_runtime.activate(model, expr, weights=weights)


def route(model: PreTrainedModel, experts: Sequence[ExprLike], gate: Gate | Mixer) -> None:
    """Make experts active whose weights ``gate`` computes at each site from what enters it, for each token.

    `y = y0 + sum_e w_e(x) (f_e(x) - y0)` with `w = gate(path, x)`: (B, T, E) in the order of ``experts``, or 1 in place
    of B or T. An expert is the name of a resident adapter or an expression; None does nothing. Undone by the next
    ``activate``. What is active stays so if this raises.

    Raises
    ------
    KindError
        An expert with a prompt, a prefix or a head of its own: no weight at a site reaches those.
    """
    model_runtime.route(model, experts, gate)


def refresh(model: PreTrainedModel) -> None:
    """Read the adapters anew: for values written where torch does not see it.

    Every operation of torch on an adapter's tensors is seen, ``.data`` too, and the next call answers with the new
    values. Not seen is what is written through memory that others share with them (``numpy()``, DLPack, other kernels),
    through a ``.data`` that was kept from before, or to a model inside ``torch.compile``.
    """
    runtime(model).refresh(anew=True)


def detach(model: PreTrainedModel, name: str) -> None:
    """Let a resident adapter go; it must not be active."""
    runtime(model).remove(name)


def eject(model: PreTrainedModel) -> None:
    """Restore forwards and requires_grad flags exactly as they were before the first adapter."""
    model_runtime.eject(model)


def identity(model: PreTrainedModel) -> BaseIdentity:
    """Identity of the frozen base: fingerprint of its unquantized weights, config and tokenizer."""
    return identity_of(model)


def save(adapter: Adapter, directory: str | Path, *, model: PreTrainedModel, task: str | None = None) -> Path:
    """Write an adapter as a directory: config, ``adapter_model.safetensors`` and, with heads, ``extra.safetensors``.

    The directory is a PEFT directory where PEFT has the kind, and :func:`attach` reads it back exactly.
    """
    return save_adapter(adapter, directory, runtime(model).sites, base=name_of(model), task=task)


def tokenizer(base: str | Path) -> Any:
    """Tokenizer of a base: ``builtin:``, a directory or a Hugging Face id."""
    return tokenizer_of(base)
