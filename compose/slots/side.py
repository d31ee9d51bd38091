"""Side atoms: networks beside the model that read its hidden states and change only the final ones.

They act at a pseudo-site, ``FINAL``: y = h + sum_e w_e F_e(h, trace), h the backbone's final states. Hooks record what
enters and leaves the blocks; the model's code is untouched, and nothing of it runs a second time but a pooler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.slots.slot import Slot
from compose.slots.stage import Node, State


class Trace:
    """What the backbone's call under way shows to side networks.

    ``hidden`` are the states that enter the first block and leave each block, (B, T, d), cut off from the graph;
    ``mask`` (B, S) tells real tokens from padding among the S that attention sees; ``causal``: each token sees only
    itself and what is before it.
    """

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self.hidden: list[Tensor] = []
        self.mask: Tensor | None = None
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


class SideSlot:
    """What acts at the final states of one model: hooks on the backbone while a side network is active."""

    program: Node | None
    per_row: bool

    def __init__(self, model: PreTrainedModel, sites: SiteMap, quiet: Callable[[], bool]) -> None:
        container, blocks = backbone(model, sites)
        self.base_layer: nn.Module = container
        self.trace = Trace(causal=sites.reads_causally or sites.is_encoder_decoder)
        self._blocks, self._quiet = blocks, quiet
        self._hooks: list[Any] = []
        self._running = self._silenced = False
        self.taps: list[Slot] = []
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model (copy.deepcopy) lowers its own adapters, at its first call.
        return {**self.__dict__, "program": None, "trace": Trace(self.trace.causal)}

    def holds(self, module: nn.Module) -> bool:
        """Whether a module's parameters are inside the backbone, where side networks let no gradient in."""
        pooler = getattr(self.base_layer, "pooler", None)  # run once more on the new states
        return module is not pooler and any(module is inside for inside in self.base_layer.modules())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The backbone's: they tell where it lives."""
        return self.base_layer.parameters()

    def lay_out(self) -> None:
        """Nothing to prepare: side networks are functions."""

    def clear(self) -> None:
        """Forget the program."""
        self.program, self.per_row = None, False

    def attend(self) -> None:
        """Put the hooks on if there is a program, take them off if there is none."""
        if self.program is None:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
        elif not self._hooks:
            first, container = self._blocks[0], self.base_layer
            self._hooks = [
                container.register_forward_pre_hook(self._enter, with_kwargs=True),
                container.register_forward_hook(self._leave, with_kwargs=True, prepend=True, always_call=True),
                first.register_forward_pre_hook(self._first, with_kwargs=True),
                *(block.register_forward_hook(self._after) for block in self._blocks),
            ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.trace.clear()
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise KindError("a side network reads a mask of shape (batch, length), not one of another form")
        self.trace.mask = mask
        self._running = True
        if self._quiet() and torch.is_grad_enabled():
            # Only side networks learn: the backbone needs no graph, whatever its inputs ask for.
            self._silenced = True
            torch.set_grad_enabled(False)

    def _first(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._running and not self.trace.hidden:  # a shared block is called once a layer
            self.trace.hidden.append((args[0] if args else kwargs["hidden_states"]).detach())

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:  # not while a checkpointed block is computed again
            self.trace.hidden.append((output if isinstance(output, Tensor) else output[0]).detach())

    def _leave(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        self._running = False
        if self._silenced:
            self._silenced = False
            torch.set_grad_enabled(True)
        if output is None or self.program is None:  # the call has failed
            self.trace.clear()
            return output
        cache = getattr(output, "past_key_values", None)
        cache = kwargs.get("past_key_values") if cache is None else cache
        self.trace.cache = getattr(cache, "self_attention_cache", cache)
        before = output[0]
        after = self.program.run(lambda x: State(x, None), before).y
        self.trace.clear()
        return self._put(output, before, after)

    def _put(self, output: Any, before: Tensor, after: Tensor) -> Any:
        """The output with other final states; what the pooler makes of them is made anew."""
        pooler = getattr(self.base_layer, "pooler", None)
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


def backbone(model: PreTrainedModel, sites: SiteMap) -> tuple[nn.Module, list[nn.Module]]:
    """The module that gives the final states (of an encoder-decoder, its decoder) and its blocks, in order."""
    stack = "decoder" if sites.is_encoder_decoder else ""
    paths = dict.fromkeys(sites.block_of(s.path) for s in sites if s.stack == stack)
    blocks = [model.get_submodule(path) for path in paths]
    # Some heads call the decoder inside their backbone directly (OPT), so the innermost module counts.
    decoder = model.get_decoder()
    inner = decoder is not model and any(blocks[0] is module for module in decoder.modules())
    return (decoder if inner else model.base_model), blocks


def depth(sites: SiteMap) -> int:
    """How many states a trace holds but for the first: blocks that share their weights count once a layer."""
    stack = "decoder" if sites.is_encoder_decoder else ""
    blocks = {sites.block_of(s.path) for s in sites if s.stack == stack}
    return int(sites.config.num_hidden_layers) if len(blocks) == 1 else len(blocks)
