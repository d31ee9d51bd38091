"""Plugins: a file in one of our folders, or an entry point of any installed package; each registers itself by name.

A contract (a kind, a scorer, a remote, ...) owns one `Registry`::

    SCORERS = Registry[type[Scorer]]("scorer", package="router.scorers", group="hub.scorers")

    @SCORERS.register("centroid")
    class Centroid(RowScorer): ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from hub.errors import HubError, UsageError, suggest

T = TypeVar("T")
_D = TypeVar("_D")


class Registry(Generic[T]):
    """Plugins of one sort by name. What registers itself is any object; nothing is imported before it is asked for.

    Parameters
    ----------
    noun
        What one of them is called in errors: ``kind``, ``scorer``, ``merge``.
    package
        Our folder of them: each of its modules is one plugin, called like what it adds.
    group
        The entry points of other packages that add more.
    error
        What is raised for an unknown name and for a name taken twice.
    """

    def __init__(self, noun: str, *, package: str, group: str, error: type[HubError] = UsageError) -> None:
        self.noun, self.package, self.group, self.error = noun, package, group, error
        self._known: dict[str, T] = {}

    def add(self, name: str, plugin: T) -> T:
        """Make ``plugin`` known as ``name``; another one of that name is refused, the same one again is not."""
        if name in self._known and _origin(self._known[name]) != _origin(plugin):
            raise self.error(
                f"{self.noun} {name!r} is registered twice: {_place(self._known[name])} and {_place(plugin)}"
            )
        self._known[name] = plugin
        return plugin

    def register(self, *names: str) -> Callable[[_D], _D]:
        """Decorator that adds a class or a function under each of ``names``."""

        def add(plugin: _D) -> _D:
            for name in names:
                self.add(name, plugin)  # type: ignore[arg-type]  # a decorator gives back exactly what it was given
            return plugin

        return add

    def names(self) -> list[str]:
        """What there is, sorted, without importing any of it."""
        files = {name for name in _modules(self.package) if not name.startswith("_")}
        return sorted(files | {point.name for point in entry_points(group=self.group)})

    def all(self) -> Mapping[str, T]:
        """All of them by name, sorted. A plugin of another package that cannot be imported is left out (`broken`)."""
        _discover(self.package, self.group)
        return MappingProxyType(dict(sorted(self._known.items())))

    def __iter__(self) -> Iterator[str]:
        return iter(self.all())

    def __contains__(self, name: object) -> bool:
        return name in self.all()

    def get(self, name: str) -> T:
        """The one called ``name``; otherwise an error with the nearest name, or with what broke it."""
        known = self.all()
        if name not in known:
            broken = next((failure for failure in self.broken() if failure.name == name), None)
            if broken:
                raise self.error(f"{self.noun} {name!r} {broken.problem}", hint="`hub doctor` lists what is broken")
            near = suggest(name, known)
            unknown = f"unknown {self.noun} {name!r}" + (f"; {near}" if near else "")
            raise self.error(unknown, hint=f"{self.noun}s: " + ", ".join(known))
        return known[name]

    def broken(self) -> tuple[BrokenPlugin, ...]:
        """Entry points of other packages that could not be loaded."""
        return _discover(self.package, self.group)


class BrokenPlugin:
    """An entry point that raised while it was loaded; it breaks only what asks for it."""

    def __init__(self, point: EntryPoint, error: Exception) -> None:
        self.point, self.error = point, error

    @property
    def name(self) -> str:
        """What it would add."""
        return self.point.name

    @property
    def problem(self) -> str:
        """What a person needs to know: the distribution, the target and the error."""
        package = self.point.dist.name if self.point.dist else "an unknown package"
        return f"of {package} cannot be loaded from {self.point.value}: {type(self.error).__name__}: {self.error}"


@cache
def _discover(package: str, group: str) -> tuple[BrokenPlugin, ...]:
    """Import the modules of ``package`` and load the entry points ``group``, once."""
    for name in _modules(package):
        importlib.import_module(f"{package}.{name}")
    broken = []
    for point in entry_points(group=group):  # a look at every installed distribution: milliseconds
        try:
            point.load()
        except Exception as error:  # noqa: BLE001  # whatever a stranger's module raises must not break ours
            broken.append(BrokenPlugin(point, error))
    return tuple(broken)


def _modules(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _origin(plugin: Any) -> tuple[Any, Any]:
    """Where a class or function was written; a module that is imported again registers the same one again."""
    return getattr(plugin, "__module__", None), getattr(plugin, "__qualname__", plugin)


def _place(plugin: Any) -> str:
    return str(getattr(plugin, "__module__", None) or plugin)
