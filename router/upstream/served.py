"""The adapters an engine has loaded, by what was asked for: a name that moves is looked up at each request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar


class Loaded(Protocol):
    """What an engine keeps for an adapter: vLLM's ``LoRARequest``."""

    lora_name: str


R = TypeVar("R", bound=Loaded)


class Served(dict[str, R]):
    """A dictionary of adapters in which a name means what it stands for when a request begins.

    An adapter is kept under its own name, which is made of its digest and so never changes. A request asks for
    ``acme/tone@prod``, and finds the adapter that this is now; what it has found stays until its end (in its context:
    each request is a task of its own), whatever is published meanwhile.

    Parameters
    ----------
    given
        Adapters with names that do not move.
    name_now
        From a name to that of the adapter it stands for now; None where it is not known. Fast, and raises nothing.
    """

    def __init__(self, given: Mapping[str, R], name_now: Callable[[str], str | None]) -> None:
        super().__init__(given)
        self._name_now = name_now
        self._found: ContextVar[Mapping[str, R]] = ContextVar("moduloom_found", default={})  # noqa: B039 - replaced whole

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> R:
        if (found := self._find(name)) is None:
            raise KeyError(name)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping."""
        found = self._find(name)
        return default if found is None else found

    def __setitem__(self, name: str, loaded: R) -> None:
        """Keep an adapter under its own name; the request that asked for it as ``name`` has found it."""
        if super().__contains__(loaded.lora_name) and name != loaded.lora_name:
            loaded = super().__getitem__(loaded.lora_name)
        super().__setitem__(loaded.lora_name, loaded)
        self._remember(name, loaded)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(self[name].lora_name)
        self._found.set({})

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def _find(self, name: str) -> R | None:
        if (found := self._found.get().get(name)) is not None:
            return found
        own = name if super().__contains__(name) else self._name_now(name)
        if own is None or not super().__contains__(own):
            return None
        found = super().__getitem__(own)
        self._remember(name, found)
        return found

    def _remember(self, name: str, loaded: R) -> None:
        self._found.set({**self._found.get(), name: loaded})
