"""Write docs/coverage.md by trying: every kind x operator x family on tiny random models.

``python docs/coverage.py`` writes the page; ``--check`` only says whether it is current. What a cell says was computed
a moment before: the composition was activated and run, and its law held; or it was refused, and that is the reason.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from compose.errors import KindError, PlanError, SiteError
from compose.kind.adapter import Adapter
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
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIGHT |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
IMAGE = 36  # the id of an image's places
# Name -> (config, head, options). The options are those that make a family what it is: relative positions, windows,
# grouped queries, experts.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "CausalLM", GROUPED),
    "mistral": ("MistralConfig", "CausalLM", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "CausalLM", {**PLAIN, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "CausalLM", GROUPED),
    "gemma": ("GemmaConfig", "CausalLM", GROUPED),
    "gemma2": ("Gemma2Config", "CausalLM", {**GROUPED, "sliding_window": 4}),
    "gemma3_text": ("Gemma3TextConfig", "CausalLM", {**GROUPED, "sliding_window": 4}),
    "phi": ("PhiConfig", "CausalLM", {**PLAIN, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", "CausalLM", {**PLAIN, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", "CausalLM", {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXConfig", "CausalLM", PLAIN),
    "opt": ("OPTConfig", "CausalLM", {**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", "CausalLM", {**IDS, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralConfig", "CausalLM", {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "CausalLM", {**EXPERTS, "num_experts": 4}),
    "gpt_oss": ("GptOssConfig", "CausalLM", {**EXPERTS, "num_local_experts": 4, "sliding_window": 4}),
    "mamba": ("MambaConfig", "CausalLM", {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "xlnet": ("XLNetConfig", "CausalLM", {**IDS, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}),
    "bert": ("BertConfig", "MaskedLM", PLAIN),
    "roberta": ("RobertaConfig", "MaskedLM", {**PLAIN, "type_vocab_size": 1}),
    "deberta-v2": (
        "DebertaV2Config",
        "MaskedLM",
        {**PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
        | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0},
    ),
    "electra": ("ElectraConfig", "MaskedLM", {**PLAIN, "embedding_size": 8}),
    "albert": ("AlbertConfig", "MaskedLM", {**PLAIN, "embedding_size": 8}),
    "distilbert": ("DistilBertConfig", "MaskedLM", {**IDS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}),
    "modernbert": (
        "ModernBertConfig",
        "MaskedLM",
        {**PLAIN, "cls_token_id": 0, "sep_token_id": 2, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "longformer": ("LongformerConfig", "MaskedLM", {**PLAIN, "attention_window": 4}),
    "t5": ("T5Config", "Seq2SeqLM", {**T5, "decoder_start_token_id": 1, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartConfig", "Seq2SeqLM", BART),
    "switch": (
        "SwitchTransformersConfig",
        "Seq2SeqLM",
        {**T5, "decoder_start_token_id": 1, "num_experts": 4, "num_sparse_encoder_layers": 1}
        | {"num_sparse_decoder_layers": 1},
    ),
    "vit": ("ViTConfig", "ImageClassification", {**SIGHT, "num_labels": 3}),
    "swin": (
        "SwinConfig",
        "ImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": (
        "ConvNextConfig",
        "ImageClassification",
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_scale_init_value": 1.0, "image_size": 32},
    ),
    "clip": ("CLIPConfig", "", {"text_config": PLAIN, "vision_config": SIGHT, "projection_dim": 16}),
    "siglip": ("SiglipConfig", "", {"text_config": PLAIN, "vision_config": SIGHT}),
    "llava": (
        "LlavaConfig",
        "ImageTextToText",
        {"text_config": {**GROUPED, "model_type": "llama"}, "image_token_index": IMAGE, "image_token_id": IMAGE}
        | {"vision_config": {**SIGHT, "model_type": "clip_vision_model"}},
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "CTC",
        {**{k: v for k, v in PLAIN.items() if k != "max_position_embeddings"}, "conv_dim": [8, 8]}
        | {"conv_kernel": [8, 4], "conv_stride": [4, 4], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
        | {"num_conv_pos_embedding_groups": 2},
    ),
    "whisper": ("WhisperConfig", "SpeechSeq2Seq", WHISPER),
}
SIZES = {"r": 3, "num_virtual_tokens": 2, "bottleneck_size": 4, "density": 0.2, "intrinsic_dimension": 20}
# Operator -> (expression, what it must equal); one without an equal must only run and change the outputs. An expression
# of each row must equal the rows alone.
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
    "rows": (["a", "b", None], ["a", "b", None]),
}
REFUSED = (KindError, PlanError, SiteError)


def model_of(family: str) -> Any:
    """A tiny random model in float32."""
    name, head, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields)
    return getattr(transformers, f"AutoModel{f'For{head}' if head else ''}").from_config(config).eval()


def batch_of(model: Any) -> dict[str, Any]:
    """Three texts, images or sounds; as many tokens as rows, so that no size tells which is which."""
    ids = torch.arange(4, 13).reshape(3, 3)
    main, config = model.main_input_name, model.config
    if main in ("input_features", "input_values"):
        length = 16 if main == "input_features" else 200
        sounds = torch.randn(3, length, generator=torch.Generator().manual_seed(0))
        batch = {main: sounds[:, None] * torch.linspace(-1, 1, 4)[:, None] if main == "input_features" else sounds}
        return {**batch, "decoder_input_ids": ids} if config.is_encoder_decoder else batch
    seen = getattr(config, "vision_config", config)
    if main == "pixel_values":
        return {main: images_of(3, seen.image_size)}
    if config.model_type == "llava":  # of these texts one shows an image, one none, and one two
        texts = torch.arange(4, 31).reshape(3, 9)
        texts[0, 1:5], texts[2, :8] = IMAGE, IMAGE
        return {"input_ids": texts, "pixel_values": images_of(3, seen.image_size)}
    if seen is not config:
        return {"input_ids": ids, "pixel_values": images_of(3, seen.image_size)}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if config.is_encoder_decoder else batch


def images_of(count: int, size: int) -> torch.Tensor:
    """Random images."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def row_of(model: Any, i: int) -> dict[str, Any]:
    """One row of the batch by itself."""
    batch = batch_of(model)
    row = {name: value[i : i + 1] for name, value in batch.items()}
    if model.config.model_type == "llava":
        row["pixel_values"] = batch["pixel_values"][(slice(0, 1), slice(1, 1), slice(1, 3))[i]]
        return row if i != 1 else {"input_ids": row["input_ids"]}
    if model.main_input_name == "input_ids" and "pixel_values" in batch:
        row["pixel_values"] = batch["pixel_values"]  # each text is compared with all images
    return row


def put(model: Any, kind: str, name: str, seed: int) -> None:
    """A resident adapter with values that do something."""
    adapter = made(model, kind, name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    runtime(model).add(name, adapter.freeze())


def made(model: Any, kind: str, name: str, seed: int) -> Adapter:
    """An adapter where its kind acts by default, or at all linear layers where there is no such place."""
    cls, home = get_kind(kind), runtime(model)
    options: dict[str, Any] = {k: v for k, v in SIZES.items() if k in cls.Config.model_fields}
    try:
        return cls(make_config(cls, options), home.sites, model, name=name, seed=seed)
    except SiteError as error:
        wide = {**options, "target_modules": "all-linear", **({"r": 1} if "r" in options else {})}
        try:
            return cls(make_config(cls, wide), home.sites, model, name=name, seed=seed)
        except REFUSED:
            raise error from None


@torch.no_grad()
def run(model: Any, expr: Any, batch: dict[str, Any] | None = None) -> torch.Tensor:
    """Outputs with an expression active."""
    activate(model, expr)
    output = model(**(batch_of(model) if batch is None else batch))
    return (output.logits_per_text if "logits_per_text" in output else output.logits).clone()


def alone(model: Any, exprs: Sequence[Any]) -> torch.Tensor:
    """Outputs of the rows of a batch, each by itself."""
    return torch.cat([run(model, expr, row_of(model, i)) for i, expr in enumerate(exprs)])


def cell(model: Any, expr: Any, same: Any, bare: torch.Tensor) -> str:
    """``yes``, or the reason of the refusal; a law that does not hold raises."""
    try:
        ours = run(model, expr)
    except REFUSED as error:
        return reason(error)
    law = alone if isinstance(expr, list) else run
    other = ours if same is None else law(model, same)
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
    text = re.sub(r"\b[\w@]+(?:\.[\w@]+){2,}\b(, a module)*( \(and \d+ more\))?", "a module", text)
    text = re.sub(r"(a module)(?:, a module)+", r"\1", text)
    text = re.sub(r"'\w+\(.*?\)'", "a merge", text)
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
    bare = run(model, None)
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
        "Made by `python docs/coverage.py`, which tries every cell on a tiny random model with its family's options. "
        "`yes` means that the composition ran, changed the outputs and equalled what the algebra says it equals; of "
        "`rows`, that each row of a batch was what it is alone. A number is a refusal, with its reason below. Adapters "
        "act where their kind does by default, or at all linear layers where there is no such place.\n"
    )
    tried = {kind: {family: column(kind, family) for family in _told(FAMILIES, kind, progress)} for kind in names}
    for label in (*OPERATORS, "lower_to_lora"):
        yield f"\n## `{label}`\n"
        yield "| family | " + " | ".join(names) + " |"
        yield "|---" * (len(names) + 1) + "|"
        for family in FAMILIES:
            marks = []
            for kind in names:
                said = tried[kind][family][label]
                marks.append("yes" if said == "yes" else f"[{notes.setdefault(said, len(notes) + 1)}]")
            yield f"| {family} | " + " | ".join(marks) + " |"
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
