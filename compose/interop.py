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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compose.kind import PREFIX, Adapter, KindConfig, KindError, get_kind, kinds, make_config
from compose.sites import SiteMap
from hub.errors import IntegrityError, NotFound

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "extra.safetensors"
_OWN = "moduloom_kind"
_TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
}


def config_fields(adapter: Adapter, sites: SiteMap, *, base: str | None, task: str | None) -> dict[str, Any]:
    """Contents of adapter_config.json: PEFT's where it has the kind, else ``moduloom_kind`` and our own config."""
    config = adapter.config
    if adapter.peft_type is None:
        return {_OWN: adapter.kind, **config.model_dump(mode="json", exclude_defaults=True)}
    fields: dict[str, Any] = {
        "peft_type": adapter.peft_type,
        "base_model_name_or_path": base,
        "task_type": _TASK_TYPES.get(task or ""),
        "inference_mode": True,
        **type(adapter).peft_config(config, sites),
    }
    if adapter.peft_type not in ("PREFIX_TUNING", "PROMPT_TUNING"):
        fields["target_modules"] = list(adapter.paths)
    if adapter.peft_type == "IA3":
        fields["feedforward_modules"] = adapter.peft_feedforward()  # type: ignore[operator]
    if config.modules_to_save:
        fields["modules_to_save"] = list(config.modules_to_save)
    return fields


def save(
    adapter: Adapter, directory: str | Path, sites: SiteMap, *, base: str | None = None, task: str | None = None
) -> Path:
    """Write the adapter as a directory; see :func:`compose.save`."""
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / WEIGHTS, adapter.state(heads=False))
    if adapter.saved:
        _write(out / EXTRA, adapter.head_state())
    text = json.dumps(_canonical(config_fields(adapter, sites, base=base, task=task)), indent=2, sort_keys=True)
    (out / CONFIG).write_text(text + "\n", encoding="utf-8")
    return out


def export_peft(adapter: Adapter, directory: str | Path, sites: SiteMap, **facts: str | None) -> Path:
    """Write a directory that ``PeftModel.from_pretrained`` reads: heads joined into the one weights file."""
    if adapter.peft_type is None:
        raise KindError(
            f"PEFT has no kind {adapter.kind!r}", hint="keep the artifact directory, which compose.attach reads"
        )
    out = save(adapter, directory, sites, **facts)
    (out / EXTRA).unlink(missing_ok=True)
    _write(out / WEIGHTS, adapter.state())
    return out


def _canonical(value: Any) -> Any:
    """Sort lists of names too: PEFT writes some from sets, whose order changes from process to process."""
    if isinstance(value, dict):
        return {k: _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_canonical(v) for v in value]
        return sorted(items) if all(isinstance(v, str) for v in items) else items
    return value


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # One metadata key only: with more, safetensors' bytes are not deterministic.
    save_file({k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}, path, metadata={"format": "pt"})


def read_config(directory: str | Path) -> tuple[type[Adapter], KindConfig]:
    """Kind and config of an adapter directory, ours or PEFT's.

    Raises
    ------
    NotFound, IntegrityError, KindError
        If the file is missing, is no JSON object, or names a PEFT type without a kind here.
    """
    return parse_config(_json(Path(directory) / CONFIG))


def parse_config(fields: Mapping[str, Any]) -> tuple[type[Adapter], KindConfig]:
    """Kind and config from the fields of an adapter_config.json."""
    if _OWN in fields:
        kind = get_kind(str(fields[_OWN]))
        return kind, make_config(kind, {k: _tuples(v) for k, v in fields.items() if k != _OWN})
    kind = _kind_of(fields)
    options = dict(kind.from_peft(fields))
    targets = fields.get("target_modules")
    if targets is not None:
        options["target_modules"] = targets if isinstance(targets, str) else tuple(sorted(targets))
        options["layers"] = _tuples(fields.get("layers_to_transform"))
    if fields.get("modules_to_save"):
        options["modules_to_save"] = tuple(sorted(fields["modules_to_save"]))
    return kind, make_config(kind, options)


def _kind_of(fields: Mapping[str, Any]) -> type[Adapter]:
    peft_type = fields.get("peft_type")
    if peft_type == "LORA":
        return get_kind("dora" if fields.get("use_dora") else "lora")
    for kind in kinds().values():
        if kind.peft_type == peft_type and peft_type is not None:
            return kind
    known = sorted({k.peft_type for k in kinds().values() if k.peft_type})
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
            tensors.update(load_file(path))
        except FileNotFoundError:
            hint = "a pickle such as adapter_model.bin is never read: re-save it with safetensors"
            raise NotFound(f"{path} is missing", path=path, hint=hint) from None
        except SafetensorError as error:
            raise IntegrityError(f"{path} is no readable safetensors file: {error}", path=path) from None
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
    adapter.load_state(_rename(adapter, tensors))
    return adapter.freeze()


def _rename(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's spellings of one tensor: modules_to_save inside heads, prompts of an encoder-decoder stored twice."""
    have = adapter.state()
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        plain = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        if plain not in have and PREFIX + plain in have:
            plain = PREFIX + plain
        if plain == "prompt_embeddings" and adapter.kind == "prompt" and plain in have:
            # PEFT stores a second copy for the decoder of an encoder-decoder and never uses it.
            value = value[: have[plain].shape[0]]  # noqa: PLW2901
        renamed[plain] = value
    return renamed


def read(directory: str | Path, sites: SiteMap, model: PreTrainedModel, *, name: str) -> Adapter:
    """Read an adapter directory onto ``model``; every tensor must find its place."""
    root = Path(directory)
    kind, config = read_config(root)
    extra = root / EXTRA
    tensors = read_tensors(root / WEIGHTS, extra if extra.exists() else None)
    return build(kind, config, tensors, sites, model, name=name)
