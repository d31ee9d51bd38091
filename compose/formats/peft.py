"""PEFT's conventions: which modules a config means, what its fields say, and how its files spell tensors.

PEFT matches by the end of a module's path and tolerates much; here every rule is followed to the letter, and a config
that says something this project cannot express is refused by the name of the field.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import regex
from transformers import PreTrainedModel

from compose.base.compatibility import BaseWarning
from compose.base.sites import SiteMap
from compose.errors import KindError
from compose.kind.adapter import Adapter
from compose.kind.tensors import PREFIX

PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING")
PROMPT_PREFIX = "base_model."  # prompt learning wraps the model once less

# Where the head is, by task: PEFT trains and stores these modules unasked, if the model has them.
_AUTOMATIC_HEADS: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Read by this module and by `directory`, or about provenance only.
_COMMON = frozenset(
    [
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "modules_to_save",
    ]
)
# How it was trained or how it started: a finished adapter computes the same whatever they say.
_TRAINING = frozenset(
    ["eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config", "velora_config"]
)
# Fields that change what is computed and that some kind here does not read.
_KNOWN_TO_MATTER = frozenset(
    [
        "alora_invocation_tokens",
        "arrow_config",
        "bias",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "kasa_config",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "ensure_weight_tying",
    ]
)
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")
_PLACEMENT = frozenset(["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"])
_PATIENCE = 1.0  # seconds for one match of a pattern from outside: some take exponential time by design
_NAMED = re.compile(r"\.default(?=\.|$)")  # what PEFT calls an adapter that was given no name
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def refuse_unread(kind: type[Adapter], fields: Mapping[str, Any]) -> None:
    """Refuse a config with a field that is set and that this kind does not read: PEFT would compute something else.

    A field that has the default of the PEFT installed here means nothing. Where PEFT is not installed, a field that no
    PEFT known here has is told of by a warning: nobody can say whether it has an effect.

    Raises
    ------
    KindError
        Names every such field.
    """
    read = _COMMON | _TRAINING | kind.peft_fields | (frozenset() if kind.peft_type in PROMPT_LEARNING else _PLACEMENT)
    odd = sorted(f for f, value in fields.items() if f not in read and value not in (None, False, "", [], {}))
    if not fields.get("modules_to_save") and not any(t in _EMBEDDINGS for t in fields.get("target_modules") or ()):
        odd = [f for f in odd if f != "ensure_weight_tying"]  # there is nothing to tie
    if odd and (defaults := _defaults(str(kind.peft_type))) is not None:
        odd = [f for f in odd if f not in defaults or fields[f] != defaults[f]]
    elif unknown := [f for f in odd if f not in _KNOWN_TO_MATTER]:
        odd = [f for f in odd if f in _KNOWN_TO_MATTER]
        warnings.warn(
            f"this PEFT {kind.peft_type} config sets {', '.join(unknown)}, which no PEFT known here has; whether that "
            "changes the outputs cannot be said (install the PEFT that wrote it, whose defaults tell)",
            BaseWarning,
            stacklevel=2,
        )
    if odd:
        unread = ", ".join(f"{f}={fields[f]!r}"[:80] for f in odd)
        raise KindError(
            f"this PEFT {kind.peft_type} config sets {unread}, which kind {kind.kind!r} cannot express",
            hint="remove a field only if it is sure to have no effect on the outputs",
        )


def _defaults(peft_type: str) -> dict[str, Any] | None:
    """What the installed PEFT gives the fields of a type's config that nobody sets; None without PEFT."""
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
    except ImportError:
        return None
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    given = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in dataclasses.fields(config) if callable(f.default_factory)}
    return {**given, **made}


def check_types(fields: Mapping[str, Any]) -> None:
    """Refuse a config whose fields about places are of another type than PEFT's.

    Raises
    ------
    KindError
        Names the field.
    """
    for name in (*sorted(_PLACEMENT), "feedforward_modules", "modules_to_save"):
        value = fields.get(name)
        several = isinstance(value, list) and all(isinstance(v, int if "layers_to" in name else str) for v in value)
        single = isinstance(value, int if "layers_to" in name else str) and name != "modules_to_save"
        if value is not None and not several and not single:
            raise KindError(f"this PEFT config has {name}={str(value)[:80]}, neither a name nor a list of names")


def check_shape_fields(kind: type[Adapter], wanted: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Compare the fields that say how a prompt's matrix is cut into layers and heads with what this base needs."""
    names = ("num_layers", "num_attention_heads", "token_dim") if kind.peft_type == "PREFIX_TUNING" else ("token_dim",)
    for name in names:
        if fields.get(name) is not None and fields[name] != wanted[name]:
            raise KindError(
                f"this PEFT {kind.peft_type} config has {name}={fields[name]!r}, and this base needs {wanted[name]!r}",
                hint="it was made for another base, or the file was edited",
            )


def placement(fields: Mapping[str, Any], sites: SiteMap) -> list[str]:
    """Paths of the linear layers that PEFT would adapt, in model order.

    A target that is a list matches a module of that very path, or one whose path ends in ``.target``; in the latter
    case ``layers_to_transform`` filters. A target that is a string is a regular expression over the whole path.

    Raises
    ------
    KindError
        If ``target_modules`` is missing or matches no linear layer.
    """
    targets = fields.get("target_modules")
    if not isinstance(targets, str | list) or not targets:
        raise KindError(
            f"this PEFT config has target_modules={targets!r}: it does not say where it acts",
            hint="save it again with PEFT, which then writes the names",
        )
    linear = set(sites.paths) if fields.get("peft_type") == "LORA" else {*sites.sites, *sites.outside}
    hit = [path for path in sites.modules if _is_target(path, targets, fields)]
    paths = [path for path in hit if path in linear]
    if odd := [path for path in hit if path in sites.tables and path not in linear]:
        raise KindError(f"this PEFT config adapts the embeddings {odd[0]}, which no kind here does")
    if not paths:
        raise KindError(
            f"target_modules={targets!r} matches no linear layer of this {sites.model_type} model",
            hint="it was made for another base"
            if not sites.fused_experts
            else f"it may be for layers inside experts, which are one parameter here: {sites.fused_experts}",
        )
    return paths


def _is_target(path: str, targets: str | list[str], fields: Mapping[str, Any]) -> bool:
    if _excluded(path, fields):
        return False
    if isinstance(targets, str):
        return _whole(targets, path)
    if path in targets:
        return True
    return any(path.endswith("." + t) for t in targets) and _in_layers(path, fields)


def _excluded(path: str, fields: Mapping[str, Any]) -> bool:
    exclude = fields.get("exclude_modules") or ()
    if isinstance(exclude, str):
        if _whole(exclude, path):
            return True
    elif any(path == e or path.endswith("." + e) for e in exclude):
        return True
    heads = [*(fields.get("modules_to_save") or ()), *_AUTOMATIC_HEADS.get(fields.get("task_type"), ())]
    return any(f".{name}." in f".{path}." for name in heads)


def _in_layers(path: str, fields: Mapping[str, Any]) -> bool:
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    if patterns:
        names = (patterns,) if isinstance(patterns, str) else patterns
        tried = (re.match(rf"(?:^|.*?\.){re.escape(name)}\.(?P<index>\d+)\.", path) for name in names)
        match = next((m for m in tried if m), None)
    else:
        match = _LAYER.match(path)
    return match is not None and int(match["index"]) in ([layers] if isinstance(layers, int) else layers)


def _whole(pattern: str, path: str) -> bool:
    try:
        return regex.fullmatch(pattern, path, timeout=_PATIENCE) is not None
    except regex.error as error:
        raise KindError(f"target pattern {pattern[:80]!r} is no regular expression: {error}") from None
    except TimeoutError:
        raise KindError(f"target pattern {pattern[:80]!r} takes too long to match {path!r}") from None


def feedforward(fields: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` whose input (IA)^3 scales: matched by the end of the path, dot or not, as PEFT does."""
    marked = fields.get("feedforward_modules") or ()
    if isinstance(marked, str):
        return [p for p in paths if _whole(marked, p)]
    return [p for p in paths if p.endswith(tuple(marked))]


def short_targets(paths: Iterable[str], sites: SiteMap, *, bare_end: bool = False) -> list[str]:
    """Shortest ``target_modules`` that mean exactly ``paths``: ends of paths where unambiguous, else whole ones.

    With ``bare_end`` they also have to be exact where no dot is asked for before the end (``feedforward_modules``).
    """
    wanted = set(paths)
    targets: set[str] = set()
    for path in wanted:
        parts = path.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
        targets.add(next((end for end in ends if _selects(end, sites, bare_end) <= wanted), path))
    return sorted(targets)


def _selects(end: str, sites: SiteMap, bare_end: bool) -> set[str]:
    dotted = {p for p in sites.modules if p == end or p.endswith("." + end)}
    return dotted | ({p for p in sites.modules if p.endswith(end)} if bare_end else set())


def head_paths(names: Sequence[str], sites: SiteMap) -> dict[str, list[str]]:
    """Modules that PEFT stores whole for each of ``names``: all whose path ends in it, dot or not."""
    return {name: [p for p in sites.modules if p.endswith(name)] for name in names}


def heads_named(names: Sequence[str], carried: Iterable[str], sites: SiteMap) -> list[str]:
    """``modules_to_save`` that PEFT reads as these modules: whole paths where the end of a name means others too."""
    wanted = set(carried)
    kept: list[str] = []
    for name, paths in head_paths(names, sites).items():
        exact = [p for p in paths if p == name or p.endswith("." + name)]
        kept.extend([name] if set(paths) <= wanted else exact)
    return sorted(kept)


def heads_to_read(fields: Mapping[str, Any], sites: SiteMap) -> tuple[str, ...]:
    """``modules_to_save`` of our config for a PEFT config: the names that this base has, as whole paths where needed.

    PEFT adds the usual names of a task's head by itself; of those, the ones this base lacks mean nothing.
    """
    usual = _AUTOMATIC_HEADS.get(fields.get("task_type"), ())
    kept: list[str] = []
    for name, paths in head_paths(sorted(set(fields.get("modules_to_save") or ())), sites).items():
        exact = [p for p in sites.modules if p == name or p.endswith("." + name)]
        if paths or name not in usual:
            kept.extend([name] if paths == exact else paths)
    return tuple(kept)


def heads_to_write(own: Sequence[str], task_type: str | None, sites: SiteMap) -> list[str]:
    """Paths of the modules whose weights PEFT will look for in a directory of this task."""
    names = [*own, *_AUTOMATIC_HEADS.get(task_type, ())]
    return sorted({p for paths in head_paths(names, sites).values() for p in paths})


def our_key(key: str, known: Mapping[str, Any]) -> str:
    """Our spelling of a key in a PEFT file: wrappers' names and PEFT's name for the adapter taken out, one prefix."""
    plain = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    for spelling in (plain, _NAMED.sub("", plain)):
        for prefix in (PREFIX, PROMPT_PREFIX, ""):
            if spelling.startswith(prefix) and PREFIX + spelling.removeprefix(prefix) in known:
                return PREFIX + spelling.removeprefix(prefix)
    return plain


def newer_names(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Keys with the names that modules have today, by the renamings with which transformers loads old checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return {key: PREFIX + rename_source_key(key.removeprefix(PREFIX), renamings, [])[0] for key in keys}


def beside_its_twin(key: str, keys: Container[str]) -> bool:
    """Whether a key is the untrained module that PEFT keeps beside a trained one; no output depends on it."""
    twins = (".", ".modules_to_save.", ".modules_to_save.default.")
    return ".original_module." in key and any(key.replace(".original_module.", twin) in keys for twin in twins)
