"""What a PEFT directory's ``adapter_config.json`` tells about it; the rest is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub.contents.checks import CONFIG
from hub.errors import GateError
from hub.io import canonical_json as canonical
from hub.io.files import read_capped

# PEFT's types and our kinds for them. Each kind declares its own too (`peft_type`, `peft_aliases`): a test compares.
PEFT_KINDS: Mapping[str, str] = {
    "LORA": "lora",  # or dora: see `kind_of`
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "prompt",
    "LOKR": "krona",
}
TASK_TYPES: Mapping[str, str] = {
    "CAUSAL_LM": "causal_lm",
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token_classification",
    "SEQ_2_SEQ_LM": "seq2seq",
}
_BASE = "base_model_name_or_path"
_REPOSITORY = re.compile(r"(?:builtin:)?[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?\Z")


def peft_kind(config: Mapping[str, Any]) -> str | None:
    """Kind that reads a PEFT config, or None."""
    kind = PEFT_KINDS.get(str(config.get("peft_type")))
    return "dora" if kind == "lora" and config.get("use_dora") else kind


def facts_of(directory: Path) -> dict[str, Any]:
    """Kind, task and hyperparameters, as far as the config states them.

    Raises
    ------
    GateError
        The config is not a JSON object.
    """
    path = directory / CONFIG
    if not path.exists():
        return {}
    config = canonical.loads(read_capped(path, canonical.MAX_JSON), what=str(path))
    if not isinstance(config, dict):
        raise GateError(f"{path} is not a JSON object", path=path)
    kind = peft_kind(config)
    task = TASK_TYPES.get(str(config.get("task_type")))
    plain = {key: value for key, value in config.items() if value not in (None, [], {})}
    return {"hyperparameters": plain} | ({"kind": kind} if kind else {}) | ({"task": task} if task else {})


def names_other_base(directory: Path, base: str) -> str | None:
    """The base that a config names, where that is not ``base`` by its last name; None where it is, or none is named."""
    stated = facts_of(directory).get("hyperparameters", {}).get(_BASE)
    if not isinstance(stated, str) or _last(stated) == _last(base):
        return None
    return stated


def _last(name: str) -> str:
    """Last part of an id or a path, of any system: where a model lies is told in many ways."""
    return re.split(r"[/\\:]", name.strip().rstrip("/\\"))[-1].lower()


def without_paths(hyperparameters: Mapping[str, Any], directory: Path | None, base: str | None) -> dict[str, Any]:
    """Hyperparameters in which a path of this machine gives way to the name of the base that was recorded, or goes.

    Parameters
    ----------
    hyperparameters
        From `facts_of`.
    directory
        Of the adapter, which a relative path may start from; None where it was made on another machine, whose paths
        are known by their form alone.
    base
        What the base is called in the manifest, where it has one.
    """
    cleaned = dict(hyperparameters)
    stated = cleaned.get(_BASE)
    if isinstance(stated, str) and not _names_repository(stated, directory):
        del cleaned[_BASE]
        cleaned |= {_BASE: base} if base else {}
    return cleaned


def _names_repository(text: str, directory: Path | None) -> bool:
    """Whether a text can be the id of a model: of that form, and no path that leads to anything here."""
    if not _REPOSITORY.match(text):
        return False
    return directory is None or not (Path(text).exists() or (directory / text).exists())
