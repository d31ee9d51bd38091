"""How a new kind, function, merge, method or scorer is found: a file in a package, or an entry point of any package."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points


@cache
def discover(package: str, group: str) -> None:
    """Import the modules of ``package`` and load the entry points ``group``, once; they register themselves."""
    found = importlib.import_module(package)
    for module in pkgutil.iter_modules(found.__path__):
        importlib.import_module(f"{package}.{module.name}")
    for point in entry_points(group=group):  # a look at every installed distribution: milliseconds
        point.load()
