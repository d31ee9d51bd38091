"""Directories of the `adapters` library (1.3), read as adapters of our kinds.

Its files name the adapter in every key (``..adapters.NAME.adapter_down.0.weight``, ``..loras.NAME.lora_A``), by module
paths of its own wrappers. What has no exact counterpart here is refused by the name of the option.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter
from compose.kind.registry import get_kind, make_config
from hub.errors import IntegrityError, NotFound

WEIGHTS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
_KEY = re.compile(r"^(?P<path>.*?)\.?(?:adapters|loras|prefix_tunings)\.(?P<name>[^.]+)\.(?P<rest>.+)$")
_NEUTRAL: Mapping[str, Any] = {  # options of a bottleneck that must stand so
    "cross_adapter": False,
    "inv_adapter": None,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "phm_layer": False,
    "adapter_residual_before_ln": False,
    "residual_before_ln": True,
    "use_gating": False,
    "stochastic_depth": 0.0,
}


@dataclass(frozen=True)
class Part:
    """One kind's share of a directory: its options, and tensors by our (site or norm, name)."""

    kind: str
    options: dict[str, Any]
    tensors: dict[tuple[str, str], Tensor]


def is_adapterhub(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is one of that library's."""
    return isinstance(fields.get("config"), Mapping) and str(fields.get("version", "")).startswith("adapters.")


def read(
    directory: str | Path, fields: Mapping[str, Any], sites: SiteMap, model: PreTrainedModel, *, name: str
) -> list[Adapter]:
    """The adapters of a directory, frozen: one, or for a union (MAM) one a member, to be applied in this order (>>).

    Raises
    ------
    NotFound, IntegrityError, KindError
        A pickle, a broken file, an option without a counterpart here, or a tensor that finds no place: named.
    """
    tensors = _tensors(Path(directory))
    config = fields["config"]
    members = config["configs"] if config.get("architecture") == "union" else [config]
    parts = [_part(member, tensors, sites) for member in members]
    read_keys = sum(len(part.tensors) for part in parts)
    if read_keys == 0:
        raise KindError(f"{directory} holds no tensor for a module of this {sites.model_type} model")
    return [_build(part, sites, model, name if len(parts) == 1 else f"{name}.{part.kind}") for part in parts]


def _tensors(directory: Path) -> dict[tuple[str, str], Tensor]:
    """Tensors by (path in that library's model, rest of the key behind the adapter's name)."""
    path = directory / WEIGHTS
    if not path.exists():
        hint = "a pickle is never read: save it again with save_adapter(directory, name, use_safetensors=True)"
        raise NotFound(f"{path} is missing", path=path, hint=hint if (directory / PICKLE).exists() else None)
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} is no readable safetensors file: {error}", path=path) from None
    split: dict[tuple[str, str], Tensor] = {}
    for key, value in stored.items():
        match = _KEY.match(key)
        if match is None:
            raise KindError(f"{path}: no kind reads {key}")
        split[match["path"], match["rest"]] = value
    return split


def _part(config: Mapping[str, Any], tensors: Mapping[tuple[str, str], Tensor], sites: SiteMap) -> Part:
    architecture = config.get("architecture")
    readers: dict[Any, Callable[..., Part]] = {None: _bottleneck, "prefix_tuning": _prefix, "lora": _lora}
    if architecture not in readers or config.get("leave_out"):
        odd = f"leave_out={config['leave_out']}" if architecture in readers else f"architecture={architecture!r}"
        raise KindError(f"this adapter of the adapters library has {odd}, which no kind here reads")
    return readers[architecture](config, tensors, sites)


def _refuse(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    odd = sorted(name for name, value in wanted.items() if config.get(name, value) != value)
    if odd:
        fields = ", ".join(f"{name}={config[name]!r}" for name in odd)
        raise KindError(f"this adapter of the adapters library sets {fields}, which no kind here expresses")


def _place(path: str, sites: SiteMap) -> str:
    """Our path of one of that library's: theirs is of the model without a head."""
    ends = [p for p in sites.modules if p == path or p.endswith("." + path)]
    if len(ends) != 1:
        raise KindError(f"{path} is {'no module' if not ends else 'not one module'} of this {sites.model_type} model")
    return str(ends[0])


def _bottleneck(config: Mapping[str, Any], tensors: Mapping[tuple[str, str], Tensor], sites: SiteMap) -> Part:
    _refuse(config, _NEUTRAL)
    parallel, behind = bool(config["is_parallel"]), bool(config["original_ln_before"])
    if not isinstance(config["scaling"], int | float) or (parallel and behind):
        raise KindError(
            f"scaling={config['scaling']!r} and is_parallel={parallel}: no kind here expresses this adapter"
        )
    names = {"adapter_down.0.weight": "down", "adapter_down.0.bias": "down_b"}
    names |= {"adapter_up.weight": "up", "adapter_up.bias": "up_b"}
    placed: dict[tuple[str, str], Tensor] = {}
    linears: dict[str, None] = {}
    for (path, rest), value in tensors.items():
        if rest in names:
            block = _place(path, sites)
            linear = next(s.path for s in sites if s.path.startswith(block + ".") and s.role in ("attn.o", "mlp.down"))
            linears[linear] = None
            placed[f"{block}.LayerNorm" if behind else linear, names[rest]] = value
    options = {
        "style": "parallel" if parallel else "houlsby" if config["mh_adapter"] else "pfeiffer",
        "target_modules": tuple(linears),
        "bottleneck_size": next((len(v) for (_, n), v in placed.items() if n == "down_b"), None),
        "non_linearity": config["non_linearity"],
        "scaling": config["scaling"],
        "behind_norm": behind,
        "dropout": config.get("dropout", 0.0),
    }
    return Part("bottleneck", options, placed)


def _lora(config: Mapping[str, Any], tensors: Mapping[tuple[str, str], Tensor], sites: SiteMap) -> Part:
    _refuse(config, {"use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None})
    scales = config["composition_mode"] == "scale"
    names = {"lora_B": "out"} if scales else {"lora_A": "A", "lora_B": "B"}
    placed = {(_place(path, sites), names[rest]): v for (path, rest), v in tensors.items() if rest in names}
    targets: dict[str, Any] = {"target_modules": tuple(dict.fromkeys(path for path, _ in placed))}
    if scales:
        _refuse(config, {"r": 1, "alpha": 1})
        return Part("ia3", {**targets, "feedforward_modules": ()}, placed)
    options = {"r": config["r"], "lora_alpha": config["alpha"], "lora_dropout": config.get("dropout", 0.0)}
    return Part("lora", {**targets, **options}, placed)


def _prefix(config: Mapping[str, Any], tensors: Mapping[tuple[str, str], Tensor], _: SiteMap) -> Part:
    """What the MLP makes of its table is stored; positions are those of the text alone."""
    _refuse(config, {"use_gating": False})
    n, stem = config["prefix_length"], "self_prefix."
    own = {rest.removeprefix(stem): v for (_, rest), v in tensors.items() if rest.startswith(stem)}
    if config["flat"]:
        prefix = own["control_trans"].reshape(n, -1)
    else:
        down, down_b, up, up_b = (own[f"control_trans.{i}.{w}"] for i in (0, 2) for w in ("weight", "bias"))
        hidden = ACT2FN[config["non_linearity"]](torch.nn.functional.linear(own["wte.weight"], down, down_b))
        prefix = torch.nn.functional.linear(hidden, up, up_b)  # (n, layers * 2 * width)
    return Part("prefix", {"num_virtual_tokens": n, "move_positions": False}, {("", "P"): prefix})


def _build(part: Part, sites: SiteMap, model: PreTrainedModel, name: str) -> Adapter:
    kind = get_kind(part.kind)
    adapter = kind(make_config(kind, part.options), sites, model, name=name)
    missing = [f"{path}:{n}" for path, n in part.tensors if not adapter.has(path, n)]
    if missing:
        raise KindError(f"{missing[0]} of the file finds no place in a {part.kind} adapter on this base")
    adapter.load_state({adapter.key(path, n): value for (path, n), value in part.tensors.items()})
    return adapter.freeze()
