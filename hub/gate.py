"""What a gate is: something that must hold before an artifact is published.

A new gate is one file in `hub.gates`, or any package's entry point ``hub.gates``; `hub push` and every other way to
publish run it from then on. Files that no artifact may hold are refused besides, wherever bytes come in: see
`hub.contents.checks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from hub.errors import GateError
from hub.manifest import Manifest
from hub.plugins import Registry

Check = Callable[[Path, Manifest], Iterable[str]]
"""(directory of the artifact, its manifest) -> warnings for the manifest. Raises GateError."""


class Gate(ABC):
    """One gate; registered under its name by ``@GATES.register("name")``."""

    needs_base: ClassVar[bool] = False
    """Whether it tries the artifact on its base: `hub push` does, what was made on that base a moment ago need not."""

    @abstractmethod
    def check(self, directory: Path, manifest: Manifest) -> Iterable[str]:
        """Return sentences for the manifest's warnings, or raise GateError where it must not be published."""


GATES = Registry[type[Gate]]("gate", package="hub.gates", group="hub.gates")


def run_gates(directory: Path, manifest: Manifest, *, on_base: bool, more: Sequence[Check] = ()) -> tuple[str, ...]:
    """Run all gates on an artifact directory.

    Parameters
    ----------
    directory, manifest
        What is to be published.
    on_base
        Whether the gates that need the base run as well.
    more
        Checks of the caller's own, after the gates.

    Returns
    -------
    tuple of str
        Their warnings, each once.

    Raises
    ------
    GateError
        It must not be published; or a gate of another package cannot be loaded, so nobody knows whether it may.
    """
    for broken in GATES.broken():
        raise GateError(
            f"the gate {broken.name!r} {broken.problem}",
            ref=manifest.ref,
            hint="mend or uninstall that package; `hub doctor` lists all that is broken",
        )
    gates = [gate().check for gate in GATES.all().values() if on_base or not gate.needs_base]
    warnings = [warning for check in (*gates, *more) for warning in check(directory, manifest)]
    return tuple(dict.fromkeys(warnings))
