"""One forward of the model: what belongs to the call and not to the model, so that calls in other threads do not meet.

What stands in a module's forward finds the call by the model's :class:`Context`: this thread's own, or between two
calls the idle one. A call keeps the composition it began with, whatever becomes active in the meantime.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from compose.slots.side import Trace
    from compose.slots.slot import Program


class Composed(Protocol):
    """What a slot has to know of the composition it is part of."""

    @property
    def programs(self) -> Mapping[str, Program]:
        """By the path of the slot."""

    @property
    def tokens(self) -> int:
        """Length of the weights per token, 0 without."""

    @property
    def only_sides_learn(self) -> bool:
        """No gradient is asked for inside the backbone."""


class _Nothing:
    programs: Mapping[str, Program] = {}
    tokens = 0
    only_sides_learn = False


class Call:
    """A forward under way."""

    def __init__(self, composition: Any, batch: int = 0, lengths: tuple[int, ...] = ()) -> None:
        self.composition = composition
        self.batch = batch  # its rows
        self.lengths = lengths  # tokens that a row may have, with and without a prompt
        self.past = 0  # tokens that its cache holds
        self.places: Tensor | None = None  # (B or 1, T) of its text, where they are told and prefixes ask for them
        self.inputs: dict[str, Tensor] = {}  # of the sites that another one taps, by path, until they are read
        self.prompt: tuple[Tensor, Tensor] | None = None  # for the embedding: where (B, T, 1) it stands, and it
        self.text_mask: Tensor | None = None  # of the source text of an encoder-decoder
        self.trace: Trace | None = None  # what side networks have seen so far
        self.sided = False  # they have acted
        self.waiting: set[str] = set()  # active places that have not run yet, if it is not known that they do
        self.open = False  # under way

    def close(self) -> None:
        """Let go of everything that is only of use inside the call."""
        self.inputs.clear()
        self.waiting = set()
        self.prompt = self.text_mask = self.places = self.trace = None
        self.open = False


class Context:
    """What all that stands in one model shares: the call of each thread, and the composition that is active.

    ``idle`` is what a module finds that is called outside of the model's own calls, as when a checkpointed block is
    computed again in the backward pass: the active composition, and the batch of the last call.
    """

    def __init__(self) -> None:
        self.idle = Call(_Nothing())
        self.running: set[Call] = set()
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"idle": None}  # a copy of a model makes its composition anew, at its first call

    def __setstate__(self, state: Any) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def call(self) -> Call:
        """The call under way in this thread, or the idle one."""
        own: Call | None = getattr(self._own, "call", None)
        return self.idle if own is None else own

    @property
    def under_way(self) -> bool:
        """Whether a call of the model is under way in this thread."""
        return self.call.open

    def take(self, composition: Composed) -> None:
        """Make a composition the one that calls begin with from now on."""
        self.idle = Call(composition, self.idle.batch, self.idle.lengths)

    def new(self) -> Call:
        """A call with the composition that is active now; what is traced knows no threads and shares the idle one."""
        return self.idle if torch.compiler.is_compiling() else Call(self.idle.composition)

    def begin(self, call: Call) -> None:
        """Make a call that of this thread."""
        call.open = True
        if call is not self.idle:
            self._own.call = call
            self.running.add(call)

    def end(self, call: Call) -> None:
        """The call is over, however it has ended; to be told twice does no harm."""
        if getattr(self._own, "call", None) is call:
            del self._own.call
        self.running.discard(call)
        self.idle.batch, self.idle.lengths = call.batch, call.lengths
        call.close()


class Standing:
    """Stands in the forward of one module, which keeps its class, its parameters and its place in the tree.

    Whatever reads the model (state dicts, save_pretrained, quantizers, optimizers) finds the module that was there.
    """

    outermost: ClassVar[bool] = False  # others stand inside it

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._forward: Any = None  # of the instance, if it had one (accelerate moves weights in such)

    def own(self, *args: Any, **options: Any) -> Any:
        """The module's own forward."""
        if self._forward is not None:
            return self._forward(*args, **options)
        return type(self.layer).forward(self.layer, *args, **options)

    @property
    def forward(self) -> Any:
        """The module's own forward as a function, with its signature."""
        return MethodType(type(self.layer).forward, self.layer) if self._forward is None else self._forward

    @property
    def stands(self) -> bool:
        """Whether the module's calls come here, be it by way of what else stands in its forward."""
        return any(forward is self for forward in self._chain())

    def _chain(self) -> Iterator[Any]:
        """What stands in the module's forward, from the outside in: ours, and what others have wrapped around it."""
        forward = self.layer.__dict__.get("forward")
        while forward is not None:
            yield forward
            forward = forward._forward if isinstance(forward, Standing) else getattr(forward, "__wrapped__", None)

    def enter(self) -> None:
        """Stand in the module's forward, from now on."""
        if self.stands:
            return
        above = self.layer.__dict__.get("forward")
        if isinstance(above, Standing) and above.outermost and not self.outermost:
            self._forward, above._forward = above._forward, self
        else:
            self._forward = above
            self.layer.__dict__["forward"] = self

    def leave(self) -> None:
        """Leave the module's forward as it was."""
        if self.layer.__dict__.get("forward") is not self:
            for above in self._chain():
                if isinstance(above, Standing) and above._forward is self:
                    above._forward = self._forward
                    break
        elif self._forward is None:
            del self.layer.__dict__["forward"]
        else:
            self.layer.__dict__["forward"] = self._forward


def own_forward(module: nn.Module) -> Any:
    """The forward of a module without what stands in it."""
    forward: Any = module.forward
    while isinstance(forward, Standing):
        forward = forward.forward
    return forward
