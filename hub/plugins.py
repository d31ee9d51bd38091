"""How a new kind, function, merge, method or scorer is found: a file in a package, or an entry point of any package."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points


def names(package: str, group: str) -> list[str]:
    """What `discover` would bring, sorted, without importing any of it: each file is called like what it adds."""
    found = importlib.import_module(package)
    files = [module.name for module in pkgutil.iter_modules(found.__path__)]
    return sorted({*files, *(point.name for point in entry_points(group=group))})


@cache
def discover(package: str, group: str) -> None:
    """Import the modules of ``package`` and load the entry points ``group``, once; they register themselves."""
    found = importlib.import_module(package)
    for module in pkgutil.iter_modules(found.__path__):
        importlib.import_module(f"{package}.{module.name}")
    for point in entry_points(group=group):  # a look at every installed distribution: milliseconds
        point.load()
