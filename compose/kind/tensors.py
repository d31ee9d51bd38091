"""The named tensors of an adapter: registered by site, keyed as on disk, and loaded whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from compose.base.weights import floating_copy
from compose.errors import KindError
from compose.kind import heads

__all__ = ["PREFIX", "NamedTensors"]

PREFIX = "base_model.model."  # PEFT's key prefix: our files are PEFT files where PEFT has the kind


_DATA: Any = nn.Parameter.data


class Watched(nn.Parameter):
    """A parameter that counts how often its ``.data`` was asked for, as what is written there moves no version counter.

    What a model has laid out of a frozen adapter is compared with the version counters of its tensors before each call.
    ``asked`` counts over all parameters, so that nothing but one number is looked at as long as nobody asks.
    """

    asked: ClassVar[int] = 0
    times_asked = 0

    @property
    def data(self) -> Tensor:
        """The values without their history; perhaps to be written to."""
        Watched.asked += 1
        self.times_asked += 1
        return cast("Tensor", _DATA.__get__(self))

    @data.setter
    def data(self, value: Tensor) -> None:
        Watched.asked += 1
        self.times_asked += 1
        _DATA.__set__(self, value)


class NamedTensors(nn.Module):
    """Parameters and stored tensors, each of a site and a name, and whole modules that are carried along."""

    kind: ClassVar[str]
    revision: int
    suffixes: ClassVar[Mapping[str, str]] = {}  # parameter name -> end of its key on disk

    def __init__(self, name: str) -> None:
        super().__init__()
        self.__dict__["revision"] = 0  # moves when what a model has lowered is no longer so
        self.name = name
        self._keys: dict[str, str] = {}  # attribute -> key on disk
        self.saved: dict[str, str] = {}  # path of a whole module we carry -> attribute

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor):  # another tensor, as load_state_dict(assign=True) gives one
            self.revision += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for parameter in self._parameters.values():
            if type(parameter) is nn.Parameter:
                parameter.__class__ = Watched  # a pickle forgets the class

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.revision += 1  # tensors may be other ones afterwards
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def count_changes(self) -> None:
        """Keep no tensor that was made in ``torch.inference_mode``: those count no changes."""
        with torch.inference_mode(False):
            for name, parameter in self._parameters.items():
                if parameter is not None and parameter.is_inference():
                    self._parameters[name] = Watched(parameter.clone(), parameter.requires_grad)
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.is_inference():
                    self._buffers[name] = buffer.clone()

    def changed(self) -> None:
        """Called when values were replaced."""

    def add(self, path: str, name: str, value: Tensor, *, trained: bool = True) -> None:
        """Register a parameter (or, not ``trained``, a stored tensor) of the site ``path`` ("" for none)."""
        attribute = _attribute(path, name)
        suffix = self.suffixes.get(name, name)
        self._keys[attribute] = f"{PREFIX}{path}.{suffix}" if path else suffix
        if trained:
            self.register_parameter(attribute, Watched(value))
        else:
            self.register_buffer(attribute, value)

    def set_fixed(self, path: str, name: str, value: Tensor) -> None:
        """Another value for a tensor that was added as not ``trained``; its shape may change."""
        setattr(self, _attribute(path, name), value)

    def at(self, path: str, name: str) -> Tensor:
        """The parameter added under ``path`` and ``name``."""
        return cast("Tensor", getattr(self, _attribute(path, name)))

    def has(self, path: str, name: str) -> bool:
        """Whether such a parameter was added."""
        return _attribute(path, name) in self._keys

    def key(self, path: str, name: str) -> str:
        """Its key on disk."""
        return self._keys[_attribute(path, name)]

    def head(self, path: str) -> nn.Module | None:
        """The whole module carried for ``path`` (see ``modules_to_save``), or None."""
        return cast("nn.Module", getattr(self, self.saved[path])) if path in self.saved else None

    def state(self, *, heads: bool = True) -> dict[str, Tensor]:
        """Tensors by their key on disk, detached, in a fixed order. Shares memory with the parameters."""
        own = {key: cast("Tensor", getattr(self, attribute)).detach() for attribute, key in self._keys.items()}
        return {**own, **self.head_state()} if heads else own

    def head_state(self) -> dict[str, Tensor]:
        """Tensors of the carried modules, keyed as PEFT's modules_to_save."""
        return {
            f"{PREFIX}{path}.{key}": value.detach()
            for path, attribute in self.saved.items()
            for key, value in getattr(self, attribute).state_dict().items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` in, keeping their dtype. All keys must be there, none may be left over, shapes must agree.

        Raises
        ------
        KindError
            Names every missing and every unexpected key, or the first shape that differs. Nothing is changed then.
        """
        # All that can be wrong is found before the first tensor is replaced.
        have = self.state()
        missing, extra = sorted(have.keys() - tensors.keys()), sorted(tensors.keys() - have.keys())
        if missing or extra:
            misfits = [f"{label} {_few(keys)}" for label, keys in (("missing", missing), ("unexpected", extra)) if keys]
            raise KindError(
                f"the tensors do not fit {self.kind} adapter {self.name!r} on this base: " + "; ".join(misfits),
                hint="hub show REF prints the base and the placement it was made for",
            )
        self.check_tensors(tensors)
        with torch.no_grad():
            for attribute, key in self._keys.items():
                own = cast("Tensor", getattr(self, attribute))
                # A copy, so that the file's tensor may go; `.data`, so that optimizers keep their parameter.
                value = tensors[key].to(device=own.device, copy=True)
                if isinstance(own, nn.Parameter):
                    own.data = value
                else:
                    setattr(self, attribute, value)
            for path, state in self._head_parts(tensors).items():
                head = cast("nn.Module", self.head(path))
                # A head may have other classes than the base's: it takes the file's number first.
                here = next((t.device for t in head.state_dict().values()), None)
                heads.take_size(head, state)
                head.load_state_dict({k: v.to(device=here, copy=True) for k, v in state.items()}, assign=True)
        self.changed()

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors of other shapes than this base wants; a carried head may have other classes.

        A kind whose files decide their own shapes overrides this for them.
        """
        have = {key: cast("Tensor", getattr(self, attribute)) for attribute, key in self._keys.items()}
        odd = [key for key, own in have.items() if key in tensors and own.shape != tensors[key].shape]
        wanted = {**have, **self.head_state()}
        for path, state in self._head_parts(tensors).items():
            if (key := heads.fits(cast("nn.Module", self.head(path)), state)) is not None:
                odd.append(f"{PREFIX}{path}.{key}")
        if odd:
            got, right = tuple(tensors[odd[0]].shape), tuple(wanted[odd[0]].shape)
            raise KindError(
                f"{odd[0]} of adapter {self.name!r} has shape {got}, this base wants {right}",
                hint="hub show REF prints the base it was made for",
            )

    def _head_parts(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        stems = {path: f"{PREFIX}{path}." for path in self.saved}
        return {p: {k.removeprefix(s): v for k, v in tensors.items() if k.startswith(s)} for p, s in stems.items()}

    def _carry(self, path: str, module: nn.Module) -> None:
        attribute = _attribute("saved", path)
        self.saved[path] = attribute
        self.add_module(attribute, floating_copy(module))


def _attribute(path: str, name: str) -> str:
    return f"{path}:{name}".replace(".", "/")  # the name of a parameter holds no dot


def _few(keys: Sequence[str], n: int = 4) -> str:
    return ", ".join(keys[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")
