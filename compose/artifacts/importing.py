"""Foreign adapter directories become ours: read onto the shapes of a base, checked key by key, written canonically.

Nothing of the base is loaded for that but its config; its weights are read only where a file repeats some of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compose.errors import KindError
from compose.formats import adapterhub
from compose.formats.directory import (
    config_fields,
    of_the_base,
    our_keys,
    read_adapter,
    save_adapter,
    whole_vocabulary,
    without_base,
)
from compose.formats.files import peek, read_config, read_tensors, write_config, write_tensors
from compose.inspection.fake_base import FakeBase
from compose.kind.adapter import Adapter
from compose.planning.members import StoredAdapter
from compose.planning.plan import Leaf
from hub.contents.checks import CONFIG, EXTRA, WEIGHTS

__all__ = ["ReadAdapter", "convert", "read_onto"]

_HEADED = ("classification", "token_classification")


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter directory on the shapes of a base: ``adapter`` has all but the numbers, ``tensors`` has those."""

    adapter: Adapter
    tensors: Mapping[str, Tensor]
    outline: FakeBase


def read_onto(
    directory: Path, base: str | Path, *, task: str | None = None, labels: Sequence[str] | None = None
) -> ReadAdapter:
    """Read an adapter directory, PEFT's or ours; every tensor must find its place on the base.

    Raises
    ------
    HubError
        A PEFT type, field or key that this base and this project cannot carry: by name.
    """
    outline = FakeBase(base, task=task, labels=labels or None)
    kind, _ = peek(directory)
    adapter = outline.put("imported", StoredAdapter(str(directory), Leaf(kind), directory))
    tensors = read_tensors(directory)
    if adapter.grown or of_the_base(tensors, adapter, outline.sites):  # copies, to be compared with what the base has
        from compose.base.model import load_base

        model = load_base(base, task=task, labels=labels or None)
        tensors = without_base(whole_vocabulary(tensors, adapter), adapter, outline.sites, model)
    return ReadAdapter(adapter, our_keys(adapter, tensors, outline.model), outline)


def convert(
    source: Path, out: Path, *, base: str | Path, task: str | None = None, labels: Sequence[str] = ()
) -> Adapter:
    """Write a foreign adapter directory as one of ours: canonical config, core and whole modules apart, the card.

    Parameters
    ----------
    source
        What PEFT's ``save_pretrained``, or the adapters library's ``save_adapter``, has written; it is not changed.
    out
        An empty directory.
    base
        What it was made for, as for :func:`compose.load`.
    task, labels
        Its task, and the names of its classes where it has any.

    Returns
    -------
    The adapter without numbers: its kind, config and paths are what a manifest needs.

    Raises
    ------
    HubError
        As :func:`read_onto`; a classifier without labels.
    """
    if task in _HEADED and not labels:
        raise KindError(
            f"{source} is a {task} adapter, and its files do not name the classes",
            hint="name them in order: --label first --label second ...",
        )
    card = source / "README.md"
    if card.is_file():
        shutil.copyfile(card, out / card.name)
    if adapterhub.is_adapterhub(read_config(source / CONFIG)):
        return _convert_adapterhub(source, out, base, task, labels)
    read = read_onto(source, base, task=task, labels=labels)
    adapter = read.adapter
    core = adapter.state(heads=False)
    write_tensors(out / WEIGHTS, {k: v for k, v in read.tensors.items() if k in core})
    heads = {key: value for key, value in read.tensors.items() if key not in core}
    if heads:
        write_tensors(out / EXTRA, heads)
    fields = config_fields(adapter, read.outline.sites, base=read.outline.name, task=task)
    write_config(out / CONFIG, fields)
    return adapter


def _convert_adapterhub(source: Path, out: Path, base: str | Path, task: str | None, labels: Sequence[str]) -> Adapter:
    """A directory of the adapters library; what it stores is computed with, so the base is loaded."""
    from compose.base.model import load_base, name_of
    from compose.runtime.model_runtime import runtime

    model = load_base(base, task=task, labels=labels or None)
    sites = runtime(model).sites
    adapter = read_adapter(source, sites, model, name="imported")
    save_adapter(adapter, out, sites, base=name_of(model), task=task)
    return adapter
