"""What a PEFT directory's ``adapter_config.json`` tells about it; the rest is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hub import canonical
from hub.errors import GateError
from hub.files import read_capped
from hub.gates import CONFIG

_KINDS = {"LORA": "lora", "IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "LOKR": "krona"}
_TASKS = {
    "CAUSAL_LM": "causal_lm",
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token_classification",
    "SEQ_2_SEQ_LM": "seq2seq",
}


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
    kind = _KINDS.get(str(config.get("peft_type")))
    if kind == "lora" and config.get("use_dora"):
        kind = "dora"
    task = _TASKS.get(str(config.get("task_type")))
    plain = {key: value for key, value in config.items() if value not in (None, [], {})}
    return {"hyperparameters": plain} | ({"kind": kind} if kind else {}) | ({"task": task} if task else {})
