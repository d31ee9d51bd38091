"""Side atoms: networks beside the model that read its hidden states and change only the final ones.

They act at a pseudo-site, ``FINAL``: y = h + sum_e w_e F_e(h, trace), h the backbone's final states. Hooks record what
enters and leaves the blocks; the model's code is untouched, and nothing of it runs a second time but a pooler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError
from compose.slots.caches import cache_of
from compose.slots.call import Context, Standing
from compose.slots.slot import Program
from compose.slots.stage import Node, State


class Trace:
    """What the backbone's call under way shows to side networks.

    ``hidden`` are the states that enter the first block and leave each block, (B, T, d), cut off from the graph;
    ``mask`` (B, S) tells real tokens from padding among the S that attention sees; ``causal``: each token sees only
    itself and what is before it.
    """

    def __init__(self, causal: bool, mask: Tensor | None = None) -> None:
        self.causal, self.mask = causal, mask
        self.hidden: list[Tensor] = []
        self.cache: Any = None
        self._joined: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, S, width) with those of the tokens before, which lie in the model's own cache.

        There, what reorders, crops or repeats the cache takes them along. A network that several branches of a
        composition evaluate has one history.
        """
        if self.cache is None:
            return key, value
        if name in self._joined:
            return self._joined[name]
        places: dict[str, int] = self.cache.__dict__.setdefault("moduloom_side", {})
        if name not in places:
            places[name] = len(self.cache.layers)
            self.cache.layers.append(DynamicLayer())
        self._joined[name] = self.cache.layers[places[name]].update(key, value)
        return self._joined[name]

    def visible(self, new: int, total: int, device: torch.device) -> Tensor | None:
        """Which of S = ``total`` keys each of the ``new`` last tokens sees, (B or 1, 1, new, S); None: all."""
        seen: Tensor | None = None
        if self.causal and new > 1:
            seen = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)[None, None]
        if self.mask is not None and self.mask.shape[1] == total:
            real = self.mask.to(device).bool()[:, None, None, :]
            own = torch.eye(total, dtype=torch.bool, device=device)[None, None, -new:]  # padding sees itself: no NaN
            seen = (real if seen is None else real & seen) | own
        return seen


class _Block(Standing):
    """Shows a block's states to the trace of the call."""

    def __init__(self, layer: nn.Module, context: Context) -> None:
        super().__init__(layer)
        self._context = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        trace = self._context.call.trace
        if trace is not None and not trace.hidden:  # of the first one; a block that is shared is called once a layer
            trace.hidden.append((args[0] if args else kwargs["hidden_states"]).detach())
        output = self.own(*args, **kwargs)
        if trace is not None:  # there is none while a checkpointed block is computed again
            trace.hidden.append((output if isinstance(output, Tensor) else output[0]).detach())
        return output


class SideSlot(Standing):
    """What acts at the final states of one model: it stands in its backbone and in the blocks."""

    def __init__(self, model: PreTrainedModel, sites: SiteMap, context: Context) -> None:
        container, blocks = backbone(model, sites)
        super().__init__(container)
        self.context = context
        self._blocks = [_Block(block, context) for block in blocks]
        self._causal, self._depth = sites.reads_causally or sites.is_encoder_decoder, depth(sites)

    def holds(self, module: nn.Module) -> bool:
        """Whether a module's parameters are inside the backbone, where side networks let no gradient in."""
        pooler = getattr(self.layer, "pooler", None)  # run once more on the new states
        return module is not pooler and any(module is inside for inside in self.layer.modules())

    @property
    def device(self) -> torch.device:
        """Where the backbone lives."""
        return next(self.layer.parameters()).device

    def trace_of_call(self) -> Trace | None:
        """What the call under way has shown so far."""
        return self.context.call.trace

    def lay_out(self, node: Node, *, per_row: bool) -> Program:
        """Nothing to prepare: side networks are functions."""
        return Program(node, per_row=per_row)

    def enter(self) -> None:
        """Stand in the backbone and the blocks."""
        for block in self._blocks:
            block.enter()
        super().enter()

    def leave(self) -> None:
        """Leave the backbone and the blocks."""
        super().leave()
        for block in self._blocks:
            block.leave()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's output with other final states."""
        call = self.context.call
        program = call.composition.programs.get(FINAL)
        if program is None or program.node is None:
            return self.own(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise KindError("a side network reads a mask of shape (batch, length), not one of another form")
        call.sided = True
        call.trace = Trace(self._causal, mask)
        try:
            # Where only side networks learn, the backbone needs no graph, whatever its inputs ask for.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not call.composition.only_sides_learn):
                output = self.own(*args, **kwargs)
            self._check_depth(len(call.trace.hidden) - 1)
            call.trace.cache = _history(output, kwargs)
            before = output[0]
            after = program.node.run(lambda x: State(x, None), before).y
        finally:
            call.trace = None
        return self._put(output, before, after)

    def _check_depth(self, ran: int) -> None:
        """A network beside the blocks knows each by its number."""
        if ran != self._depth:
            raise KindError(
                f"a side network reads the states of {self._depth} blocks, and {max(ran, 0)} ran in this call of "
                f"{type(self.layer).__name__}",
                hint="`hub compose kinds` lists those that act inside the model",
            )

    def _put(self, output: Any, before: Tensor, after: Tensor) -> Any:
        """The output with other final states; what the pooler makes of them is made anew."""
        pooler = getattr(self.layer, "pooler", None)
        if not isinstance(output, tuple) and output.get("pooler_output") is not None and pooler is None:
            raise KindError(
                f"a side network cannot act in {type(self.layer).__name__}, which pools its final states itself",
                hint="`hub compose kinds` lists those that act inside the model",
            )
        if isinstance(output, tuple):
            pooled = (pooler(after),) if isinstance(pooler, nn.Module) and len(output) > 1 else output[1:2]
            return (after, *pooled, *output[2:])
        output["last_hidden_state"] = after
        if isinstance(pooler, nn.Module) and output.get("pooler_output") is not None:
            output["pooler_output"] = pooler(after)
        states = output.get("hidden_states")
        if isinstance(states, tuple) and states and states[-1] is before:
            output["hidden_states"] = (*states[:-1], after)
        return output


def _history(output: Any, kwargs: Mapping[str, Any]) -> Any:
    """The cache that takes what side networks remember; None without one.

    Raises
    ------
    KindError
        One that has no place for it, and holds tokens: of those nothing would be known.
    """
    before, after = cache_of(kwargs), cache_of(output) if isinstance(output, Mapping) else None
    found = after or before
    cache = None if found is None else getattr(found[1], "self_attention_cache", found[1])
    if cache is None or hasattr(cache, "layers"):
        return cache
    if before is not None:
        raise KindError(
            f"a side network reads the tokens before, and {before[0]!r} has no place for what it knows of them",
            hint="generate with use_cache=False",
        )
    return None


def backbone(model: PreTrainedModel, sites: SiteMap) -> tuple[nn.Module, list[nn.Module]]:
    """The module that gives the final states (of an encoder-decoder, its decoder) and its blocks, in order."""
    blocks = [model.get_submodule(path) for path in _blocks(sites)]
    if sites.text:
        return model.get_submodule(sites.text), blocks
    # Some heads call the decoder inside their backbone directly (OPT), so the innermost module counts.
    decoder = model.get_decoder()
    while (within := getattr(decoder, "get_decoder", lambda: None)()) not in (None, decoder) and _has(within, blocks):
        decoder = within
    inner = decoder is not model and _has(decoder, blocks)
    return (decoder if inner else model.base_model), blocks


def _has(module: nn.Module, blocks: list[nn.Module]) -> bool:
    return any(blocks[0] is inside for inside in module.modules())


def _blocks(sites: SiteMap) -> list[str]:
    """Paths of the blocks that make the final states, in order."""
    stack = "decoder" if sites.is_encoder_decoder else ""
    inside = (s.path for s in sites if s.stack == stack and sites.reads_text(s.path))
    return list(dict.fromkeys(map(sites.block_of, inside)))


def depth(sites: SiteMap) -> int:
    """How many states a trace holds but for the first: blocks that share their weights count once a layer."""
    blocks = _blocks(sites)
    shared = getattr(sites.config, "num_hidden_layers", 1)
    return int(shared) if len(blocks) == 1 else len(blocks)
