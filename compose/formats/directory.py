"""Adapter directories: PEFT's format where PEFT has the kind, the same layout with our own config elsewhere.

``adapter_config.json`` is canonical (sorted keys and lists), ``adapter_model.safetensors`` carries no metadata but the
format, and whole modules (modules_to_save) stand apart in ``extra.safetensors`` so that the core stays loadable by
engines that take plain LoRA; :func:`export_peft` joins them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.formats import adapterhub
from compose.formats import peft as layout
from compose.kind.adapter import Adapter, KindConfig, original_module
from compose.kind.patterns import as_dict
from compose.kind.registry import get_kind, kinds, make_config
from compose.kind.tensors import PREFIX
from hub.errors import IntegrityError, NotFound
from hub.foreign.peft_config import TASK_TYPES, kind_of
from hub.io.disk import tensor_file

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "extra.safetensors"
_OWN = "moduloom_kind"
_TASK_TYPES = {task: peft for peft, task in TASK_TYPES.items()} | {"regression": "SEQ_CLS"}
_CLASSES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def config_fields(adapter: Adapter, sites: SiteMap, *, base: str | None, task: str | None) -> dict[str, Any]:
    """Contents of adapter_config.json: PEFT's where it has the kind, else ``moduloom_kind`` and our own config.

    PEFT does not know parts of fused linears: it would pass over them without a word.
    """
    config = adapter.config
    if adapter.peft_type is None or adapter.acts_on_parts:
        own = {_OWN: adapter.kind, **config.model_dump(mode="json", exclude_defaults=True)}
        patterns = own.keys() & {"rank_pattern", "alpha_pattern"}
        return {**own, **{name: as_dict(getattr(config, name), sites.paths) for name in patterns}}
    fields: dict[str, Any] = {
        "peft_type": adapter.peft_type,
        "base_model_name_or_path": base,
        "task_type": _TASK_TYPES.get(task or ""),
        "inference_mode": True,
        **type(adapter).peft_config(config, sites),
    }
    if adapter.peft_type == "IA3":
        inputs = adapter.peft_feedforward()  # type: ignore[operator]
        outputs = layout.short_targets(set(adapter.paths) - set(inputs), sites)
        fields["feedforward_modules"] = layout.short_targets(inputs, sites, bare_end=True)
        fields["target_modules"] = [*outputs, *fields["feedforward_modules"]]
    elif adapter.peft_type not in layout.PROMPT_LEARNING:
        fields["target_modules"] = layout.short_targets(adapter.paths, sites)
    if config.modules_to_save:
        fields["modules_to_save"] = layout.heads_named(config.modules_to_save, adapter.saved, sites)
    return fields


def save(
    adapter: Adapter, directory: str | Path, sites: SiteMap, *, base: str | None = None, task: str | None = None
) -> Path:
    """Write the adapter as a directory; see :func:`compose.save`."""
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    own = adapter.state(heads=False)
    _write_tensors(out / WEIGHTS, own)
    if extra := {key: value for key, value in adapter.head_state().items() if key not in own}:
        _write_tensors(out / EXTRA, extra)
    _write_config(out / CONFIG, config_fields(adapter, sites, base=base, task=task))
    return out


def export_peft(
    adapter: Adapter,
    directory: str | Path,
    *,
    sites: SiteMap,
    model: PreTrainedModel,
    base: str | None = None,
    task: str | None = None,
) -> Path:
    """Write a directory that ``PeftModel.from_pretrained`` reads: one weights file with heads and all.

    PEFT looks for the weights of a classification task's head whether they were trained or not, so an adapter without
    its own gets the base's. ``task`` is told by the model's class unless given.

    Raises
    ------
    KindError
        If PEFT has no such kind, or has no task under which it would apply this prompt or prefix.
    """
    if adapter.peft_type is None:
        raise KindError(
            f"PEFT has no kind {adapter.kind!r}", hint="keep the artifact directory, which compose.attach reads"
        )
    fields = config_fields(adapter, sites, base=base, task=task)
    by_class = next((t for c, t in _CLASSES.items() if sites.architecture.endswith(c)), None)
    fields["task_type"] = fields["task_type"] or by_class
    prompting = adapter.peft_type in layout.PROMPT_LEARNING
    if prompting and fields["task_type"] is None:
        raise KindError(
            f"PEFT has no task type for {sites.architecture}, without which it leaves a {adapter.kind} out silently",
            hint="give the task",
        )
    prefix = layout.PROMPT_PREFIX if prompting else PREFIX
    tensors = dict(adapter.state(heads=False))
    for path in layout.heads_to_write(fields.get("modules_to_save", ()), fields["task_type"], sites):
        head = adapter.head(path) or original_module(model, path)
        tensors.update({f"{prefix}{path}.{key}": value for key, value in head.state_dict().items()})
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    _write_tensors(out / WEIGHTS, tensors)
    _write_config(out / CONFIG, fields)
    return out


def _write_config(path: Path, fields: Mapping[str, Any]) -> None:
    text = json.dumps(_canonical(fields), indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _canonical(value: Any) -> Any:
    """Sort lists of names too: PEFT writes some from sets, whose order changes from process to process."""
    if isinstance(value, dict):
        return {k: _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_canonical(v) for v in value]
        return sorted(items) if all(isinstance(v, str) for v in items) else items
    return value


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}  # safetensors refuses tensors that share memory, as a head's tied biases do
    for key, value in sorted(tensors.items()):
        held = value.detach().cpu().contiguous()
        apart[key] = held.clone() if held.data_ptr() in seen else held
        seen.add(held.data_ptr())
    # One metadata key only: with more, safetensors' bytes are not deterministic.
    with tensor_file(path):
        save_file(apart, path, metadata={"format": "pt"})


def read_config(directory: str | Path, sites: SiteMap) -> tuple[type[Adapter], KindConfig]:
    """Kind and config of an adapter directory, ours or PEFT's, on the base that ``sites`` describes.

    Raises
    ------
    NotFound, IntegrityError, KindError
        If the file is missing, is no JSON object, names a PEFT type without a kind here, or says something that the
        kind cannot express: the field is named.
    """
    return parse_config(_json(Path(directory) / CONFIG), sites)


def peek(directory: str | Path) -> tuple[str, dict[str, Any]]:
    """Name of the kind and the raw config fields of an adapter directory, without a base."""
    fields = _json(Path(directory) / CONFIG)
    return (str(fields[_OWN]) if _OWN in fields else _kind_of(fields).kind), fields


def parse_config(fields: Mapping[str, Any], sites: SiteMap) -> tuple[type[Adapter], KindConfig]:
    """Kind and config from the fields of an adapter_config.json."""
    if _OWN in fields:
        kind = get_kind(str(fields[_OWN]))
        return kind, make_config(kind, {k: _tuples(v) for k, v in fields.items() if k != _OWN})
    kind = _kind_of(fields)
    layout.check_types(fields)
    layout.refuse_unread(kind, fields)
    options = dict(kind.from_peft(fields))
    if kind.peft_type not in layout.PROMPT_LEARNING:
        paths = layout.placement(fields, sites)
        options["target_modules"] = tuple(layout.short_targets(paths, sites))
        if "feedforward_modules" in options:
            options["feedforward_modules"] = tuple(layout.feedforward(fields, paths))
    options["modules_to_save"] = layout.heads_to_read(fields, sites)
    config = make_config(kind, options)
    if kind.peft_type in layout.PROMPT_LEARNING:
        layout.check_shape_fields(kind, kind.peft_config(config, sites), fields)
    return kind, config


def _kind_of(fields: Mapping[str, Any]) -> type[Adapter]:
    if (name := kind_of(fields)) is not None:
        return get_kind(name)
    peft_type = fields.get("peft_type")
    for kind in kinds().values():  # those of other packages
        if peft_type is not None and peft_type in (kind.peft_type, *kind.peft_aliases):
            return kind
    known = sorted({t for k in kinds().values() for t in (k.peft_type, *k.peft_aliases) if t})
    raise KindError(f"no kind reads PEFT type {peft_type!r}", hint="PEFT types read here: " + ", ".join(known))


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path.parent} is no adapter directory: it has no {path.name}", path=path) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}", path=path) from None
    if not isinstance(fields, dict):
        raise IntegrityError(f"{path} holds no JSON object", path=path)
    return fields


def read_tensors(weights: Path, extra: Path | None) -> dict[str, Tensor]:
    """Tensors of an adapter directory's files (safetensors only; nothing is unpickled)."""
    tensors: dict[str, Tensor] = {}
    for path in (weights, extra):
        if path is None:
            continue
        try:
            found = load_file(path)
        except FileNotFoundError:
            hint = "a pickle such as adapter_model.bin is never read: re-save it with safetensors"
            raise NotFound(f"{path} is missing", path=path, hint=hint) from None
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path} is no readable safetensors file: {error}", path=path) from None
        if twice := sorted(tensors.keys() & found.keys()):
            raise IntegrityError(f"{path} and {weights.name} both hold {twice[0]}", path=path)
        tensors.update(found)
    return tensors


def build(
    kind: type[Adapter],
    config: KindConfig,
    tensors: Mapping[str, Tensor],
    sites: SiteMap,
    model: PreTrainedModel,
    *,
    name: str,
) -> Adapter:
    """An adapter of ``kind`` on ``model`` holding ``tensors``, frozen."""
    adapter = kind(config, sites, model, name=name)
    broken = next((key for key, value in tensors.items() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise KindError(f"{broken} of adapter {name!r} holds NaN or infinite values", hint="train it again")
    adapter.load_state(_rename(adapter, _without_base(tensors, model)))
    return adapter.freeze()


def _without_base(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Leave out copies of the base's own weights: PEFT writes those of an adapted ``lm_head`` or embedding."""
    kept: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path, copied, name = key.removeprefix(PREFIX).rpartition(".base_layer.")
        if not copied:
            kept[key] = value
            continue
        layer = original_module(model, path) if path in dict(model.named_modules()) else None
        own = None if layer is None else layer.state_dict().get(name)
        if own is None or own.shape != value.shape or not torch.equal(own.cpu(), value.to(own.dtype)):
            raise KindError(
                f"the file replaces the base's own weight {path}.{name} by another",
                hint="it was made on a base with another vocabulary or other weights",
            )
    return kept


def _rename(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's spellings of one tensor: wrappers around heads, prompts of an encoder-decoder stored twice."""
    have = adapter.state()
    renamed = {layout.our_key(key, have): value for key, value in tensors.items()}
    if len(renamed) < len(tensors):
        raise KindError(f"adapter {adapter.name!r} holds a tensor twice, under two spellings of its key")
    prompt = renamed.get("prompt_embeddings")
    if adapter.kind == "prompt" and prompt is not None and len(prompt) == 2 * len(have["prompt_embeddings"]):
        # PEFT stores a second copy for the decoder of an encoder-decoder and never uses it.
        renamed["prompt_embeddings"] = prompt[: len(prompt) // 2]
    return renamed


def read(directory: str | Path, sites: SiteMap, model: PreTrainedModel, *, name: str) -> Adapter:
    """Read an adapter directory onto ``model``; every tensor must find its place."""
    root = Path(directory)
    fields = _json(root / CONFIG)
    if adapterhub.is_adapterhub(fields):
        return _only(adapterhub.read(root, fields, sites, model, name=name), root)
    kind, config = parse_config(fields, sites)
    extra = root / EXTRA
    tensors = read_tensors(root / WEIGHTS, extra if extra.exists() else None)
    return build(kind, config, tensors, sites, model, name=name)


def _only(parts: list[Adapter], root: Path) -> Adapter:
    if len(parts) > 1:
        told = " >> ".join(part.name for part in parts)
        raise KindError(
            f"{root} is a union of {len(parts)} adapters, {told}: no single one does what it does",
            hint="compose.formats.adapterhub.read gives them apart",
        )
    return parts[0]
