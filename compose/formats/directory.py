"""Adapter directories: PEFT's format where PEFT has the kind, the same layout with our own config elsewhere.

``adapter_config.json`` is canonical (sorted keys and lists), ``adapter_model.safetensors`` carries no metadata but the
format, and whole modules (modules_to_save) stand apart in ``extra.safetensors`` so that the core stays loadable by
engines that take plain LoRA; :func:`export_peft` joins them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compose.base.sites import SiteMap, fused_experts, input_embeddings, output_embeddings
from compose.errors import KindError
from compose.formats import adapterhub, peft
from compose.formats.files import OWN_KIND, file_of, kind_of, read_config, read_tensors, write_config, write_tensors
from compose.kind.adapter import Adapter, KindConfig
from compose.kind.patterns import as_dict
from compose.kind.registry import get_kind, make_config
from compose.kind.tensors import PREFIX
from hub.contents.checks import CONFIG, EXTRA, WEIGHTS
from hub.foreign.peft_config import TASK_TYPES
from hub.store import Artifact

_LOGITS_BIAS = "final_logits_bias"  # a buffer that BART and its relatives add to their logits
_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.")
_TASK_TYPES = {task: task_type for task_type, task in TASK_TYPES.items()} | {"regression": "SEQ_CLS"}
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
        own = {OWN_KIND: adapter.kind, **config.model_dump(mode="json", exclude_defaults=True)}
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
        outputs = peft.short_targets(set(adapter.paths) - set(inputs), sites)
        fields["feedforward_modules"] = peft.short_targets(inputs, sites, bare_end=True)
        fields["target_modules"] = [*outputs, *fields["feedforward_modules"]]
    elif adapter.peft_type not in peft.PROMPT_LEARNING:
        fields["target_modules"] = peft.short_targets(adapter.paths, sites)
    if config.modules_to_save:
        fields["modules_to_save"] = peft.heads_named(config.modules_to_save, adapter.saved, sites)
    return fields


def save_adapter(
    adapter: Adapter, directory: str | Path, sites: SiteMap, *, base: str | None = None, task: str | None = None
) -> Path:
    """Write the adapter as a directory; see :func:`compose.save`."""
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    own = adapter.state(heads=False)
    write_tensors(out / WEIGHTS, own)
    if extra := {key: value for key, value in adapter.head_state().items() if key not in own}:
        write_tensors(out / EXTRA, extra)
    write_config(out / CONFIG, config_fields(adapter, sites, base=base, task=task))
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
    prompting = adapter.peft_type in peft.PROMPT_LEARNING
    if prompting and fields["task_type"] is None:
        raise KindError(
            f"PEFT has no task type for {sites.architecture}, without which it leaves a {adapter.kind} out silently",
            hint="give the task",
        )
    prefix = peft.PROMPT_PREFIX if prompting else PREFIX
    tensors = dict(adapter.state(heads=False))
    for path in peft.heads_to_write(fields.get("modules_to_save", ()), fields["task_type"], sites):
        head = adapter.head(path) or model.get_submodule(path)
        tensors.update({f"{prefix}{path}.{key}": value for key, value in head.state_dict().items()})
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, tensors)
    write_config(out / CONFIG, fields)
    return out


def parse_config(fields: Mapping[str, Any], sites: SiteMap) -> tuple[type[Adapter], KindConfig]:
    """Kind and config from the fields of an adapter_config.json, ours or PEFT's, on the base of ``sites``.

    Raises
    ------
    KindError
        A PEFT type without a kind here, or a field that says something the kind cannot express: named.
    """
    if OWN_KIND in fields:
        kind = get_kind(str(fields[OWN_KIND]))
        return kind, make_config(kind, {k: _tuples(v) for k, v in fields.items() if k != OWN_KIND})
    kind = get_kind(kind_of(fields))
    peft.check_types(fields)
    peft.refuse_unread(kind, fields)
    options = dict(kind.from_peft(fields))
    if kind.peft_type not in peft.PROMPT_LEARNING:
        paths = peft.placement(fields, sites)
        options["target_modules"] = tuple(peft.short_targets(paths, sites))
        if "feedforward_modules" in options:
            options["feedforward_modules"] = tuple(peft.feedforward(fields, paths))
    options["modules_to_save"] = peft.heads_to_read(fields, sites)
    config = make_config(kind, options)
    if kind.peft_type in peft.PROMPT_LEARNING:
        peft.check_shape_fields(kind, kind.peft_config(config, sites), fields)
    return kind, config


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
    adapter, tensors = on_its_vocabulary(kind(config, sites, model, name=name), tensors, sites, model)
    broken = next((key for key, value in tensors.items() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise KindError(f"{broken} of adapter {name!r} holds NaN or infinite values", hint="train it again")
    adapter.load_state(our_keys(adapter, without_base(tensors, adapter, sites, model), model))
    return adapter.freeze()


def on_its_vocabulary(
    adapter: Adapter, tensors: Mapping[str, Tensor], sites: SiteMap, model: PreTrainedModel
) -> tuple[Adapter, Mapping[str, Tensor]]:
    """The adapter with the tables of a vocabulary that was resized for it, which it then carries whole, as heads are.

    PEFT's `save_embedding_layers` writes them as copies of the base's. Where they have more rows, the first are the
    base's (:func:`without_base` compares) and the others belong to this adapter alone: the base stays as it is.
    Modules that share a table (T5's) each get it, whichever of them the file names.

    Raises
    ------
    KindError
        The model adds something else of the size of its vocabulary to its logits (BART).
    """
    copies = of_the_base(tensors, adapter, sites)
    tables = [m.weight for m in (input_embeddings(model), output_embeddings(model)) if m is not None] if copies else []
    modules = {path: model.get_submodule(path) for path in sites.modules}
    ends = {path: m for path, m in modules.items() if any(getattr(m, "weight", None) is table for table in tables)}
    grown = {
        path: key
        for key, (path, name) in copies.items()
        if path in ends and name == "weight" and ".base_layer." not in key and _longer(tensors[key], ends[path])
    }
    if not grown or any(".base_layer." in key for key in copies):
        return adapter, tensors
    tied = getattr(model.config, "tie_word_embeddings", False)  # one key is enough for all
    grown = {e: key for path, key in grown.items() for e, m in ends.items() if tied or m.weight is ends[path].weight}
    size = len(cast("Tensor", ends[next(iter(grown))].weight))
    if beside := next((n for n, b in model.named_buffers() if n.endswith(_LOGITS_BIAS) and b.shape[-1] == size), None):
        raise KindError(
            f"adapter {adapter.name!r} has a vocabulary of its own, and {sites.architecture} adds {beside}, of the "
            f"base's {size} tokens, to its logits",
            hint=_resize(len(tensors[next(iter(grown.values()))])),
        )
    own = type(adapter)(
        adapter.config.model_copy(update={"modules_to_save": (*adapter.config.modules_to_save, *grown)}),
        sites,
        model,
        name=adapter.name,
    )
    own.grown = grown
    return own, whole_vocabulary(tensors, own)


def whole_vocabulary(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """With a table under each name that it has in the base: of tied ones a file may hold one."""
    others = {key: value for key, value in tensors.items() if key not in adapter.grown.values()}
    return {**others, **{f"{PREFIX}{path}.weight": tensors[key] for path, key in adapter.grown.items()}}


def _resize(tokens: int) -> str:
    return f"load it, model.resize_token_embeddings({tokens}), save it, and give that directory as the base"


def _longer(value: Tensor, end: nn.Module) -> bool:
    own = cast("Tensor", end.weight)
    return value.dim() == own.dim() == 2 and value.shape[1] == own.shape[1] and len(value) > len(own)


def of_the_base(tensors: Mapping[str, Tensor], adapter: Adapter, sites: SiteMap) -> dict[str, tuple[str, str]]:
    """Keys that hold weights of the base itself, with the module and the name there.

    PEFT writes those of an adapted ``lm_head`` or embedding (``.base_layer.``), and the whole embeddings where
    `save_embedding_layers` says so, or where it takes the vocabulary for resized.
    """
    have, modules, copies = adapter.state(), set(sites.modules), dict[str, tuple[str, str]]()
    for key in tensors:
        path, _, name = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
        if ".base_layer." in key or (path in modules and peft.our_key(key, have) not in have):
            copies[key] = path, name
    return copies


def without_base(
    tensors: Mapping[str, Tensor], adapter: Adapter, sites: SiteMap, model: PreTrainedModel
) -> dict[str, Tensor]:
    """Leave out copies of the base's own weights (see `of_the_base`).

    Raises
    ------
    KindError
        A copy differs from what the base has: it was made on another one, or on a vocabulary of another size.
    """
    copies = of_the_base(tensors, adapter, sites)
    modules = dict(model.named_modules()) if copies else {}
    for path in adapter.grown:
        table = cast("Tensor", model.get_submodule(path).weight)
        if not torch.equal(table.cpu(), tensors[f"{PREFIX}{path}.weight"][: len(table)].to(table.dtype)):
            raise KindError(
                f"the file replaces the base's own weight {path}.weight by another, with more rows",
                hint="it was made on a base with other weights",
            )
    for key, (path, name) in copies.items():
        own = model.get_submodule(path).state_dict().get(name) if path in modules else None
        value = tensors[key]
        if own is not None and own.shape == value.shape and torch.equal(own.cpu(), value.to(own.dtype)):
            continue
        resized = own is not None and own.dim() == value.dim() and own.shape[1:] == value.shape[1:] != own.shape
        raise KindError(
            f"the file replaces the base's own weight {path}.{name} by another",
            hint=f"the base has {len(own)} rows there, the file {len(value)}: {_resize(len(value))}"
            if own is not None and resized
            else "it was made on a base with another vocabulary or other weights",
        )
    return {key: value for key, value in tensors.items() if key not in copies}


def our_keys(adapter: Adapter, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """PEFT's spellings of one tensor: wrappers around heads, prompts of an encoder-decoder stored twice.

    Modules may bear the names that an older transformers gave them.
    """
    have = adapter.state()
    tensors = {key: value for key, value in tensors.items() if not peft.beside_its_twin(key, tensors)}
    renamed = {peft.our_key(key, have): value for key, value in tensors.items()}
    if unknown := [key for key in renamed if key not in have]:
        newer = peft.newer_names(unknown, model)
        renamed = {peft.our_key(newer.get(key, key), have): value for key, value in renamed.items()}
    inside = next((key for key in renamed if key not in have and _OF_AN_EXPERT.search(key)), None)
    if inside is not None and (fused := fused_experts(model)) is not None:
        raise KindError(
            f"adapter {adapter.name!r} adapts a layer inside an expert, {inside.removeprefix(PREFIX)}, and the experts "
            f"of this model are one parameter, {fused}, which no kind adapts",
            hint="train it again without target_modules inside the experts",
        )
    if len(renamed) < len(tensors):
        raise KindError(f"adapter {adapter.name!r} holds a tensor twice, under two spellings of its key")
    prompt = renamed.get("prompt_embeddings")
    if adapter.kind == "prompt" and prompt is not None and len(prompt) == 2 * len(have["prompt_embeddings"]):
        # PEFT stores a second copy for the decoder of an encoder-decoder and never uses it.
        renamed["prompt_embeddings"] = prompt[: len(prompt) // 2]
    return renamed


def read_adapter(source: Artifact | str | Path, sites: SiteMap, model: PreTrainedModel, *, name: str) -> Adapter:
    """Read an adapter, an artifact or a directory, onto ``model``, frozen; every tensor must find its place.

    Raises
    ------
    NotFound, IntegrityError, KindError
        A file is missing or broken, a config says what no kind expresses, or a tensor does not fit: named.
    """
    where = source if isinstance(source, Artifact) else Path(source)
    fields = read_config(file_of(where, CONFIG))
    if isinstance(where, Path) and adapterhub.is_adapterhub(fields):
        return _only(adapterhub.read(where, fields, sites, model, name=name), where)
    kind, config = parse_config(fields, sites)
    return build(kind, config, read_tensors(where), sites, model, name=name)


def _only(parts: list[Adapter], root: Path) -> Adapter:
    if len(parts) > 1:
        names = " >> ".join(part.name for part in parts)
        raise KindError(
            f"{root} is a union of {len(parts)} adapters, {names}: no single one does what it does",
            hint="compose.formats.adapterhub.read gives them apart",
        )
    return parts[0]
