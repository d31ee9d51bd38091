"""Write docs/coverage.md by trying: every kind x operator x family on tiny random models.

``python docs/coverage.py`` writes the page; ``--check`` only says whether it is current. What a cell says was computed
a moment before: the composition was activated and run, and its law held; or it was refused, and that is the reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from compose.errors import KindError, PlanError, SiteError
from compose.kind.registry import get_kind, kinds, make_config
from compose.merging.merge import lower_to_lora
from compose.runtime.model_runtime import activate, runtime

HOME = Path(__file__).parent
IDS = {"vocab_size": 37, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
PLAIN = {
    **IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 4}
STACKS = {f"{s}_{w}": n for s in ("encoder", "decoder") for w, n in (("attention_heads", 4), ("ffn_dim", 24))}
BART = {**IDS, **STACKS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
T5 = {**IDS, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 4}
WHISPER = {
    **BART,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 32,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "CausalLM", GROUPED),
    "mistral": ("MistralConfig", "CausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "CausalLM", {**PLAIN, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "CausalLM", GROUPED),
    "gemma": ("GemmaConfig", "CausalLM", GROUPED),
    "phi": ("PhiConfig", "CausalLM", PLAIN),
    "gpt2": ("GPT2Config", "CausalLM", {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXConfig", "CausalLM", PLAIN),
    "opt": ("OPTConfig", "CausalLM", {**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", "CausalLM", {**IDS, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "bert": ("BertConfig", "MaskedLM", PLAIN),
    "roberta": ("RobertaConfig", "MaskedLM", PLAIN),
    "deberta-v2": ("DebertaV2Config", "MaskedLM", PLAIN),
    "electra": ("ElectraConfig", "MaskedLM", {**PLAIN, "embedding_size": 8}),
    "albert": ("AlbertConfig", "MaskedLM", {**PLAIN, "embedding_size": 8}),
    "distilbert": ("DistilBertConfig", "MaskedLM", {**IDS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}),
    "modernbert": ("ModernBertConfig", "MaskedLM", {**PLAIN, "cls_token_id": 0, "sep_token_id": 2}),
    "t5": ("T5Config", "Seq2SeqLM", {**T5, "decoder_start_token_id": 1}),
    "bart": ("BartConfig", "Seq2SeqLM", BART),
    "vit": ("ViTConfig", "ImageClassification", {**PLAIN, "image_size": 8, "patch_size": 4, "num_labels": 3}),
    "whisper": ("WhisperConfig", "SpeechSeq2Seq", WHISPER),
}
SIZES = {"r": 3, "num_virtual_tokens": 2, "bottleneck_size": 4, "density": 0.2, "intrinsic_dimension": 20}
# Operator -> (expression, what it must equal); one without an equal must only run and change the outputs.
OPERATORS: dict[str, tuple[Any, Any]] = {
    "a": ("a", None),
    "0.5 * a": ("0.5 * a", None),
    "a + b": ("a + b", "b + a"),
    "a >> lora": ("a >> l", None),
    "average": ("average(a, a)", "a"),
    "ties": ("ties(a, density=1)", "a"),
    "dare": ("dare(a, density=1)", "a"),
    "slerp": ("slerp(a, b)", None),
    "svd": ("svd(a, b, rank=3)", None),
    "cat": ("cat(a)", "a"),
    "rows": (["a", "b", None], None),
}
REFUSED = (KindError, PlanError, SiteError)


def model_of(family: str) -> Any:
    """A tiny random model in float32."""
    name, head, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields)
    return getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()


def batch_of(model: Any) -> dict[str, Any]:
    """Three texts, images or sounds."""
    ids = torch.arange(4, 19).reshape(3, 5)
    kind = model.config.model_type
    if kind == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8)}
    if kind == "whisper":
        return {"input_features": torch.linspace(-1, 1, 3 * 4 * 16).reshape(3, 4, 16), "decoder_input_ids": ids}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch


def put(model: Any, kind: str, name: str, seed: int) -> None:
    """A resident adapter with values that do something."""
    cls, home = get_kind(kind), runtime(model)
    options = {k: v for k, v in SIZES.items() if k in cls.Config.model_fields}
    adapter = cls(make_config(cls, options), home.sites, model, name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    home.add(name, adapter.freeze())


@torch.no_grad()
def run(model: Any, expr: Any) -> torch.Tensor:
    """Logits with an expression active."""
    activate(model, expr)
    return model(**batch_of(model)).logits.clone()


def cell(model: Any, expr: Any, same: Any, bare: torch.Tensor) -> str:
    """``yes``, or the reason of the refusal; a law that does not hold raises."""
    try:
        ours = run(model, expr)
    except REFUSED as error:
        return reason(error)
    other = ours if same is None else run(model, same)
    gap = float((ours - other).abs().max())
    if gap > 1e-3 * max(1.0, float(ours.abs().max())) or not bool(torch.isfinite(ours).all()):
        raise AssertionError(f"{model.config.model_type}: {expr} differs from {same} by {gap:.2g}")
    if float((ours - bare).abs().max()) < 1e-6:
        raise AssertionError(f"{model.config.model_type}: {expr} has no effect")
    return "yes"


def reason(error: Exception) -> str:
    """The message without names of modules and adapters, which differ from family to family."""
    text = getattr(error, "message", str(error)).split("\n")[0]
    text = re.sub(r"^[\w.]+\([^:]*\): ", "", text)  # the merge it names stands in the table's head
    text = re.sub(r"\b[\w@]+(?:\.[\w@]+){2,}\b", "a module", text)
    return text if len(text) < 160 else text[:157] + "..."


def lowered(model: Any) -> str:
    """Whether an adapter can be written as a plain LoRA."""
    try:
        lower_to_lora(model, "a", rank=4)
    except REFUSED as error:
        return reason(error)
    return "yes"


def column(kind: str, family: str) -> dict[str, str]:
    """All operators for one kind on one family."""
    model = model_of(family)
    bare = model(**batch_of(model)).logits.detach()
    try:
        for seed, (name, what) in enumerate((("a", kind), ("b", kind), ("l", "lora"))):
            put(model, what, name, seed)
    except REFUSED as error:
        return dict.fromkeys((*OPERATORS, "lower_to_lora"), reason(error))
    cells = {label: cell(model, expr, same, bare) for label, (expr, same) in OPERATORS.items()}
    return {**cells, "lower_to_lora": lowered(model)}


def page(progress: Callable[[str], None]) -> Iterator[str]:
    """The page, part by part."""
    names, notes = list(kinds()), dict[str, int]()
    yield "# What works where\n"
    yield (
        "Made by `python docs/coverage.py`, which tries every cell on a tiny random model: `yes` means that the "
        "composition ran, changed the outputs and equalled what the algebra says it equals. A number is a refusal, "
        "with its reason below.\n"
    )
    tried = {kind: {family: column(kind, family) for family in _told(FAMILIES, kind, progress)} for kind in names}
    for label in (*OPERATORS, "lower_to_lora"):
        yield f"\n## `{label}`\n"
        yield "| kind | " + " | ".join(FAMILIES) + " |"
        yield "|---" * (len(FAMILIES) + 1) + "|"
        for kind in names:
            marks = []
            for family in FAMILIES:
                said = tried[kind][family][label]
                marks.append("yes" if said == "yes" else f"[{notes.setdefault(said, len(notes) + 1)}]")
            yield f"| {kind} | " + " | ".join(marks) + " |"
    yield "\n## Reasons\n"
    yield from (f"{number}. {said}" for said, number in notes.items())


def _told(families: Any, kind: str, progress: Callable[[str], None]) -> Iterator[str]:
    for family in families:
        progress(f"{kind} on {family}")
        yield family


def main(check: bool) -> int:
    """Write the page, or say whether it is current."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    interactive = sys.stderr.isatty()
    text = "\n".join(page(lambda line: sys.stderr.write(f"\r{line:50}") if interactive else None)) + "\n"
    path = HOME / "coverage.md"
    if not check:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("docs/coverage.md is not current: run `python docs/coverage.py`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
