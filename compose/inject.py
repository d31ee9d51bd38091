"""Inject, activate, eject: the life of adapters inside a frozen model.

``model.moduloom`` holds the runtime: which adapters are resident, which composition is active. Slots replace base
layers where some adapter acts and stay until :func:`eject` puts every module, parameter and flag back as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose import prompting
from compose.attention import PrefixState, stack_prefixes, use_interface
from compose.expr import IDENTITY, Add, Call, Expr, Ref, Scale, normalize, parse
from compose.function import bind
from compose.functions.average import AverageOptions, shares
from compose.kind import Adapter, KindError
from compose.lowering import flatten, site_program, unsupported
from compose.merge import average_tensors
from compose.prompting import PromptState, stack_prompts
from compose.sites import SiteMap
from compose.slot import Context, PositionSlot, Slot
from compose.stage import Coefficient, Node, Stage
from hub.errors import NotFound, did_you_mean

ExprLike = Expr | str | None
_HOME = "moduloom"  # attribute of the model that holds the runtime


class Runtime:
    """Adapters and slots of one model, and the composition that is active."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sites = SiteMap(model)
        self.context = Context()
        self.adapters: dict[str, Adapter] = {}
        self.rows: tuple[Expr, ...] = (IDENTITY,)
        self.weights: Mapping[str, Coefficient] = {}
        self._slots: dict[str, Slot] = {}
        self._positions: list[PositionSlot] = []
        self._prompt: PromptState | None = None
        self._prefixed: list[nn.Module] = []
        self._was_live = False
        self._depth = 0
        self._trim = 0
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        self._bank = nn.ModuleDict()  # as submodules, adapters follow .to(), .train() and DDP
        model.add_module("moduloom_adapters", self._bank)
        self._hooks = [h for m in self._entries() for h in self._watch(m)]

    # -- residents -------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter) -> Adapter:
        """Make an adapter resident under ``name``; an earlier one of that name is replaced."""
        adapter.name = name
        adapter.to(self.model.device)
        self.adapters[name] = adapter
        self._bank[name.replace(".", "\u00b7")] = adapter
        if any(name in row.refs for row in self.rows):
            self.refresh()
        return adapter

    def remove(self, name: str) -> None:
        """Let a resident adapter go. It must not be active."""
        self._known(name)
        if any(name in row.refs for row in self.rows):
            raise KindError(f"adapter {name!r} is active", hint="activate something else first")
        del self.adapters[name], self._bank[name.replace(".", "\u00b7")]

    def _known(self, name: str) -> Adapter:
        if name not in self.adapters:
            near = did_you_mean(name, self.adapters)
            raise NotFound(
                f"no adapter {name!r} is attached" + (f"; did you mean {' or '.join(near)}?" if near else ""),
                ref=name,
                hint="compose.attach(model, name, source) makes one resident",
            )
        return self.adapters[name]

    # -- activation ------------------------------------------------------------------------------------------------

    def activate(self, rows: Sequence[Expr], weights: Mapping[str, Coefficient]) -> None:
        """Make these rows active (one: for all rows of any batch). On an error what was active stays active."""
        for name in weights:
            self._known(name)
        lowered = tuple(normalize(self._without_calls(row)) for row in rows)
        for row in lowered:
            for name in row.refs:
                self._known(name)
        before = self.rows, self.weights
        self.rows, self.weights = lowered, weights
        try:
            self.refresh()
        except Exception:
            self.rows, self.weights = before
            self.refresh()
            raise

    def refresh(self) -> None:
        """Lower the active composition anew: after activation, and each forward while an adapter trains."""
        active = [self.adapters[n] for n in dict.fromkeys(n for row in self.rows for n in row.refs)]
        self._was_live = self.live
        for slot in self._slots.values():
            slot.clear()
        paths = dict.fromkeys(p for a in active for p in (*a.paths, *a.saved) if self._is_site(p, a))
        for path in paths:
            slot = self.slot(path)
            slot.program = site_program(self, path, self.rows)
            slot.per_row = slot.program is not None and _weighs_rows(slot.program)
        prefix = self._set_prefixes(active)
        self._prompt = self._stack_prompts(active)
        self._set_positions(prefix)

    def _is_site(self, path: str, adapter: Adapter) -> bool:
        return path in adapter.saved or not (adapter.prefix(path) or adapter.prompt())

    @property
    def live(self) -> bool:
        """Whether an active adapter is training."""
        return any(self.adapters[n].trainable for row in self.rows for n in row.refs)

    def slot(self, path: str) -> Slot:
        """The slot at ``path``, put in place on first use."""
        if path not in self._slots:
            slot = Slot(self.model.get_submodule(path), self.context)
            slot.train(slot.base_layer.training)
            _replace(self.model, path, slot)
            self._slots[path] = slot
        return self._slots[path]

    def _without_calls(self, expr: Expr) -> Expr:
        """Averages become weighted sums, or a merged adapter where the kind is not linear in its weight."""
        if isinstance(expr, Call):
            if expr.function != "average":
                raise unsupported(expr)
            return self._average(expr)
        if isinstance(expr, Ref):
            return expr
        if isinstance(expr, Scale):
            return Scale(expr.factor, self._without_calls(expr.of))
        return type(expr)([self._without_calls(c) for c in expr.children]) if expr.children else expr  # type: ignore[call-arg]

    def _average(self, call: Call) -> Expr:
        options = cast("AverageOptions", bind(call))
        weights = [float(share) for share in shares(len(call.args), options.weights)]
        members = [self._known(n) for arg in call.args for n in arg.refs]
        if all(a.averages_in_weight for a in members):
            terms = [Scale(w, self._without_calls(arg)) for w, arg in zip(weights, call.args, strict=True)]
            return terms[0] if len(terms) == 1 else Add(terms)
        if not all(isinstance(arg, Ref) for arg in call.args):
            odd = next(a for a in members if not a.averages_in_weight)
            raise KindError(
                f"average(...) mixes the tensors of {odd.kind} adapters such as {odd.name!r}, "
                "so its arguments must be adapters, not expressions"
            )
        name = str(Call(call.function, call.args, call.options))
        self.add(name, average_tensors(members, weights, name=name))
        return Ref(name)

    # -- attention and embedding -----------------------------------------------------------------------------------

    def _set_prefixes(self, active: Sequence[Adapter]) -> PrefixState | None:
        for module in self._prefixed:
            del module.moduloom_prefix
        self._prefixed.clear()
        holders = {p: [a.name for a in active if a.prefix(p)] for a in active for p in a.paths if a.prefix(p)}
        use_interface(self.model, on=bool(holders))
        state: PrefixState | None = None
        for path, names in holders.items():
            module = self.model.get_submodule(path)
            rows = [
                [(c, self.adapters[n].prefix(path)) for c, n in self._row(i) if n in names and not _is_zero(c)]
                for i in range(self._row_count())
            ]
            if not any(rows):
                continue
            state = stack_prefixes(cast("Any", rows), self.model.device)
            module.moduloom_prefix = state
            self._own_bias(path, module)
            self._prefixed.append(module)
        return state

    def _own_bias(self, path: str, module: nn.Module) -> None:
        """T5 keeps the relative bias of a stack in its first layer: tell the others where."""
        if hasattr(module, "has_relative_attention_bias"):
            stem = path.split(".layer.", maxsplit=1)[0].rsplit(".", 1)[0]
            first = next(
                m for n, m in self.model.named_modules() if n.startswith(stem) and hasattr(m, "relative_attention_bias")
            )
            object.__setattr__(module, "moduloom_bias_owner", first)

    def _stack_prompts(self, active: Sequence[Adapter]) -> PromptState | None:
        names = [a.name for a in active if a.prompt()]
        if not names:
            return None
        rows: list[list[Tensor]] = []
        for i in range(self._row_count()):
            kept = [(c, n) for c, n in self._row(i) if n in names and not _is_zero(c)]
            for c, n in kept:
                if float(c) != 1.0:
                    raise KindError(
                        f"prompt {n!r} has weight {float(c):g}: a prompt is there or not, it has no half",
                        hint="average(a, b) mixes the embeddings of prompts; 0 leaves one out",
                    )
            rows.append([cast("Any", self.adapters[n].prompt()).embeddings for _, n in kept])
        table = self.model.get_input_embeddings().weight
        return stack_prompts(rows, table.new_zeros(0, table.shape[1], dtype=torch.float32))

    def _row_count(self) -> int:
        """Rows told apart by the expressions or by the weights given by name."""
        given = [w.shape[0] for w in self.weights.values() if isinstance(w, Tensor)]
        return max([len(self.rows), *given])

    def _row(self, i: int) -> list[tuple[Coefficient, str]]:
        """Adapters of row i with that row's weights (a number, or (T,) per token)."""
        pairs = flatten(self.rows[i if len(self.rows) > 1 else 0], self.weights)
        return [(c[i] if isinstance(c, Tensor) else c, n) for c, n in pairs]

    def _set_positions(self, prefix: PrefixState | None) -> None:
        shift: Tensor | None = None
        if prefix is not None:
            shift = (~prefix.log_weight.isneginf()).any(1).sum(1)
        if self._prompt is not None:
            short = self._prompt.shortfall()
            shift = -short if shift is None else shift - short
        if shift is not None and bool(shift.any()) and not self._positions:
            for path in self.sites.positions:
                slot = PositionSlot(self.model.get_submodule(path), self.context)
                _replace(self.model, path, slot)
                self._positions.append(slot)
        for slot in self._positions:
            slot.offset = None if shift is None or not bool(shift.any()) else shift[:, None]

    # -- around the model's forward --------------------------------------------------------------------------------

    def _entries(self) -> list[nn.Module]:
        """Modules whose forward may be called from outside: the model, its backbone, and an encoder (by generate)."""
        backbone = self.model.base_model
        found = [self.model] + ([backbone] if backbone is not self.model else [])
        if self.sites.is_encoder_decoder:
            found.append(self.model.get_encoder())
        return found

    def _watch(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._depth += 1
        try:
            return self._prepare(module, args, kwargs)
        except BaseException:
            self._depth -= 1  # the forward hook is not called when a pre-hook fails
            raise

    def _prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        encoder = self.sites.is_encoder_decoder and module is self.model.get_encoder()
        if self._depth > 1 and not encoder:
            return None
        kwargs = prompting.bound_arguments(module, args, kwargs)
        if self._depth == 1:
            self.context.batch = _batch(kwargs)
            if len(self.rows) > 1:
                _check_rows(self.context.batch, len(self.rows))
            if self.live or self._was_live:  # parameters moved since the last lowering, or have just been frozen
                self.refresh()
        if self._prompt is None:
            return (), kwargs
        if self.sites.is_encoder_decoder and not encoder:
            return (), self._for_cross_attention(kwargs)
        embedding = self.model.get_input_embeddings()
        extended = prompting.extend_inputs(self._prompt, embedding, module, kwargs)
        if self._depth == 1 and not encoder:
            source = extended.get("inputs_embeds")
            self._trim = 0 if source is None or source is kwargs.get("inputs_embeds") else int(source.shape[1])
        return (), extended

    def _for_cross_attention(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        mask, states = kwargs.get("attention_mask"), kwargs.get("encoder_outputs")
        prompt = cast("PromptState", self._prompt)
        if mask is None and states is None and bool(prompt.shortfall().any()):
            mask = torch.ones_like(kwargs["input_ids"])
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": prompting.extend_mask(prompt, mask, mask.shape[0])}
        return kwargs

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth == 0 and self._trim and self._prompt is not None:
            total, self._trim = self._trim, 0
            return prompting.trim_outputs(output, self._prompt.length, total)
        return output

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Put everything back."""
        self.rows, self.weights = (IDENTITY,), {}
        self.refresh()
        for path, slot in self._slots.items():
            _replace(self.model, path, slot.base_layer)
        for path, position in zip(self.sites.positions, self._positions, strict=False):
            _replace(self.model, path, position.base_layer)
        for hook in self._hooks:
            hook.remove()
        del self.model._modules["moduloom_adapters"]
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._slots.clear()
        self.adapters.clear()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _weighs_rows(node: Node) -> bool:
    if isinstance(node, Stage):
        return any(isinstance(e.coefficient, Tensor) for e in node.entries)
    if hasattr(node, "parts"):
        return any(_weighs_rows(p) for p in node.parts)
    return any(isinstance(c, Tensor) or _weighs_rows(n) for c, n in cast("Any", node).terms)


def _is_zero(c: Coefficient) -> bool:
    return not bool(c.any()) if isinstance(c, Tensor) else c == 0


def _batch(kwargs: Mapping[str, Any]) -> int:
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "encoder_outputs")
    source = next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
    if source is None:
        return 0
    return int(source.shape[0] if isinstance(source, Tensor) else source[0].shape[0])


def _check_rows(batch: int, rows: int) -> None:
    if batch % rows:
        raise KindError(
            f"the active composition has {rows} rows and the batch has {batch}",
            hint="activate one expression per row, or one for all",
        )


# -- functions over a model --------------------------------------------------------------------------------------


def runtime(model: PreTrainedModel) -> Runtime:
    """The runtime of ``model``; the first call injects it and freezes the base."""
    found = model.__dict__.get(_HOME)
    if found is None:
        found = Runtime(model)
        model.__dict__[_HOME] = found
    return cast("Runtime", found)


def activate(
    model: PreTrainedModel, expr: ExprLike | Sequence[ExprLike], *, weights: Mapping[str, Coefficient] | None = None
) -> None:
    """Make a composition active; see :func:`compose.activate`."""
    several = not (expr is None or isinstance(expr, str | Expr))
    rows = [_as_expr(e) for e in (cast("Sequence[ExprLike]", expr) if several else [cast("ExprLike", expr)])]
    if not rows:
        raise KindError("an empty list of rows was given", hint="give one expression per row, or None for the base")
    runtime(model).activate(rows, dict(weights or {}))


def _as_expr(value: ExprLike) -> Expr:
    if value is None:
        return IDENTITY
    return parse(value) if isinstance(value, str) else value


def eject(model: PreTrainedModel) -> None:
    """Restore modules, parameters and requires_grad flags as they were before the first adapter."""
    found = model.__dict__.pop(_HOME, None)
    if found is not None:
        found.close()
