"""Which row of a batch what enters a module belongs to, found by trial calls of the bare base.

The sizes of one call cannot tell: (T, B, d) looks like (B, T, d) where T = B, and tokens that an expert has gathered
may be as many as the rows. So the model is called with a few small random rows, then with one of them changed: what
moves at a module is that row's. This happens once a model and form of input (a text, images, an encoder's states),
before the first call that tells rows apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from compose.base.sites import FINAL, SiteMap
from compose.errors import KindError
from compose.runtime.positions import position_argument
from compose.runtime.trial_findings import (
    Finding,
    Runs,
    Trial,
    find,
    find_positions,
    find_states,
    joined,
    sample,
)
from compose.runtime.trial_inputs import Sizes, TrialInputs, example, exchanged, form
from compose.slots.row_layout import ROWS_FIRST
from compose.slots.side import backbone

_SIZES = Sizes(3, 11), Sizes(2, 13)  # unlike each other, so that no size is taken for another
_SMALL = Sizes(3, 5), Sizes(2, 7)  # for tables of few positions
FAILURES = (  # of a model that is called with what it was not made for
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class RowTrials:
    """The trial calls of one model, and what they have shown: ``found`` by path.

    ``at_rest`` makes the model its bare base in eval mode, and puts all back afterwards.
    """

    def __init__(
        self, model: PreTrainedModel, sites: SiteMap, at_rest: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.found: dict[str, Finding] = {}
        self._model, self._sites, self._at_rest = model, sites, at_rest
        self._tried: dict[Hashable, str | None] = {}  # forms of input, and how a call of such failed
        self._watched: set[str] = set()
        self._widths: set[int] = set()  # of the states that blocks get and give

    def knows(self, paths: Iterable[str]) -> bool:
        """Whether trials have reached all of these."""
        return all(path in self.found for path in paths)

    def before_activation(self, paths: Iterable[str]) -> None:
        """Try what can be tried without an example: a text, or an image of the size that the config names."""
        given = example(self._model)
        if given is not None and not self.knows(paths):
            self._try(self._model, given, paths)

    def before_call(self, module: nn.Module, given: Mapping[str, Any], paths: Iterable[str]) -> None:
        """Try a call such as that of ``module`` with the arguments ``given``, unless all ``paths`` are known.

        Raises
        ------
        KindError
            The model cannot be called with random rows, so nothing is known of it.
        """
        if self.knows(paths):
            return
        failure = self._try(module, given, paths)
        if failure is not None and not any(path in self.found for path in paths):
            raise KindError(
                f"rows cannot have adapters of their own: a trial call of {type(module).__name__} failed ({failure})",
                hint="activate one composition for the whole batch",
            )

    def reads_more(self, module: nn.Module, given: Mapping[str, Any]) -> bool:
        """Whether a call has inputs beside the rows', such as images beside texts."""
        present = {name: value for name, value in given.items() if value is not None}
        return bool(TrialInputs(module, self._model, present).others)

    def _holds_no_values(self) -> bool:
        return isinstance(next(self._model.parameters()).data, FakeTensor)

    def _try(self, module: nn.Module, given: Mapping[str, Any], paths: Iterable[str]) -> str | None:
        if not set(paths) <= self._watched:
            self._watched |= {*paths, *map(self._sites.module_of, self._sites.paths)}
            self._tried.clear()
        if self._holds_no_values():  # its calls only count operations
            self.found |= dict.fromkeys(self._watched, ROWS_FIRST)
        path = next(path for path, m in self._model.named_modules() if m is module)
        key = path, form(given)
        if key not in self._tried and not self.knows(paths):
            inputs = TrialInputs(module, self._model, given)
            failure = self._call(module, inputs, alone=True)
            if inputs.others and not self.knows(paths):
                second = self._call(module, inputs, alone=False)
                failure = None if second is None else failure
            self._tried[key] = failure
        return self._tried.get(key)

    def _call(self, module: nn.Module, inputs: TrialInputs, *, alone: bool) -> str | None:
        """The five calls of :mod:`compose.runtime.trial_findings`; ``alone``: without what is not of the rows."""
        room = int(getattr(self._sites.config, "max_position_embeddings", None) or _SIZES[1].length)
        many, few = _SIZES if room >= _SIZES[1].length else _SMALL
        base, other = inputs.drawn(many, 0), inputs.drawn(many, 1)
        rows = base, exchanged(base, other, 0), exchanged(base, other, 1), base, inputs.drawn(few, 2)
        beside = [{}] * 5 if alone else [inputs.cut(r, changed=i == 3) for i, r in enumerate((3, 3, 3, 3, 2))]
        try:
            with self._at_rest(), torch.no_grad():
                seen = [self._watch(module, {**own, **rest}) for own, rest in zip(rows, beside, strict=True)]
        except FAILURES as error:
            return told(error)
        trial = Trial(many, few, inputs.reads_text)
        for path in self._watched:
            found = self._find(path, Runs(*(s.get(path, ()) for s in seen)), trial)
            if found is not None:
                self.found[path] = joined(self.found.get(path), found)
        return None

    def _find(self, path: str, runs: Runs, trial: Trial) -> Finding | None:
        if path == FINAL:
            return find_states(runs, trial, self._widths)
        return find_positions(runs, trial) if path in self._sites.positions else find(runs, trial)

    def _watch(self, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Call ``module``, and note what enters the watched modules; of the final states, all they are made from."""
        seen: dict[str, list[Tensor]] = {}

        def note(path: str, x: Any) -> None:
            if isinstance(x, Tensor):
                seen.setdefault(path, []).append(sample(x))
                if path == FINAL:
                    self._widths.add(x.shape[-1])

        def entering(path: str) -> Callable[..., None]:
            read = _position_ids if path in self._sites.positions else _first_tensor
            return lambda module, args, kwargs: note(path, read(module, args, kwargs))

        modules, hooks = dict(self._model.named_modules()), []
        try:
            if FINAL in self._watched:
                final, blocks = backbone(self._model, self._sites)
                hooks.append(final.register_forward_hook(lambda *given: note(FINAL, given[-1][0])))
                hooks += [b.register_forward_pre_hook(entering(FINAL), with_kwargs=True) for b in blocks]
            for path in self._watched & modules.keys():
                hooks.append(modules[path].register_forward_pre_hook(entering(path), with_kwargs=True))
            module(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
        return seen


def _first_tensor(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ARG001
    """What enters a module, as a rule."""
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((value for value in given if isinstance(value, Tensor)), None)


def _position_ids(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module of positions reads; None if it makes them up itself."""
    place = position_argument(getattr(module, "base_layer", module))
    if place is None:
        return None
    return kwargs[place[0]] if place[0] in kwargs else args[place[1]]


def told(error: Exception) -> str:
    """The first line of what a model said, or the name of the error."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _cuda(model: nn.Module) -> list[int]:
    """The CUDA devices that a model lies on."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each of its modules has the attributes, submodules and hooks that it had.

    What a call leaves in a model goes too: positions of the last text, attention that short texts have switched over,
    hooks that transformers puts on at the first call. Random numbers go on as if nothing had been.
    """
    before = [(m, dict(m.__dict__), _contents(m.__dict__)) for m in model.modules()]
    try:
        for module, _, _ in before:
            if module.training:
                module.__dict__["training"] = False
        with torch.random.fork_rng(_cuda(model)):
            yield
    finally:
        for module, attributes, contents in before:
            _restore(module.__dict__, attributes)
            for name, content in contents.items():
                _restore(attributes[name], content)


def _restore(table: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    """Put back what has changed, and nothing else: other threads may be reading."""
    for name in table.keys() - content.keys():
        del table[name]
    for name, value in content.items():
        if table.get(name, table) is not value:
            table[name] = value


def _contents(attributes: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    """The tables among a module's attributes: of submodules, parameters, buffers and hooks, and its own."""
    return {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
