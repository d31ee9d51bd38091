"""The adapters of a model as modules of it: they follow ``.to()`` and ``.train()``, and optimizers find them.

In a state dict stands what training changes: an adapter that trains is in it, so that a checkpoint can be gone on from,
and a frozen one is not. What ``save_pretrained`` writes of a model whose adapters are frozen is the base, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from compose.kind.adapter import Adapter


class Bank(nn.ModuleDict):
    """Adapters by name."""

    def hold(self, adapters: Mapping[str, Adapter]) -> None:
        """Hold these and no others."""
        self.__dict__["_modules"] = {_key(name): adapter for name, adapter in adapters.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors of the adapters that train."""
        some = nn.ModuleDict()
        some.__dict__["_modules"] = {k: m for k, m in self._modules.items() if cast("Adapter", m).trainable}
        return some.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A frozen adapter that the state dict does not have is not missing: it stays what it is.
        for key, adapter in self._modules.items():
            own = prefix + key + "."
            if not cast("Adapter", adapter).trainable:
                known = adapter.state_dict(prefix=own, keep_vars=True)
                state_dict.update({name: value for name, value in known.items() if name not in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _key(name: str) -> str:
    """An adapter's key among the submodules, where "train" or "a.b" could not stand."""
    return "@" + name.replace(".", "\u00b7")
