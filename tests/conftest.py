"""Shared by all tests: an isolated home, and tiny random models of real transformer families.

``tiny`` builds the models once a session and hands out copies; torch and transformers are imported on first use, so
that tests of the hub stay light.
"""

from __future__ import annotations

import copy
import os
from typing import Any

# Before torch is imported: tests run side by side (pytest -n 2), one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

VOCABULARY = 53
PAD = 1  # RoBERTa and OPT count their positions around it
_BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
_COMMON = {**_BLOCKS, **_IDS, "max_position_embeddings": 48}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_COMMON, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {**_COMMON, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 48}),
    "bert": ("BertConfig", _COMMON),
    "roberta": ("RobertaConfig", _COMMON),
    "t5": (
        "T5Config",
        {**_IDS, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8}
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": PAD},
    ),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
}
# Families in which one module sees rows in one place and then in another, so that rows cannot differ there.
_SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "deberta-v2": (
        "DebertaV2Config",
        {**_COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
        | {"share_att_key": True, "position_biased_input": False},
    ),
}
_HEADS = {
    "lm": {"bert": "AutoModelForMaskedLM", "roberta": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"},
    "classification": {},
}
_CAUSAL = ("llama", "qwen2", "gpt2", "opt", "gpt_neox")


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's own store."""
    monkeypatch.setenv("HUB_HOME", str(tmp_path_factory.mktemp("home")))


class Tiny:
    """Tiny random models of the eight families (hidden 32, two layers), their batches and their adapters."""

    families = tuple(_CONFIGS)
    causal = _CAUSAL
    decoding = (*_CAUSAL, "t5")
    dtypes = ("fp32", "bf16", "nf4")

    def __init__(self, directory: Any) -> None:
        self._directory = directory
        self._made: dict[tuple[Any, ...], Any] = {}

    # -- models ----------------------------------------------------------------------------------------------------

    def model(self, family: str, dtype: str = "fp32", task: str = "lm", **config: Any) -> Any:
        """A fresh copy of the family's model, in eval mode. ``config`` changes fields of its config."""
        key = (family, dtype, task, tuple(sorted(config.items())))
        if key not in self._made:
            self._made[key] = self._make(family, dtype, task, config)
        return copy.deepcopy(self._made[key])

    def _make(self, family: str, dtype: str, task: str, config: dict[str, Any]) -> Any:
        import torch
        import transformers

        name, fields = (_CONFIGS | _SHARED)[family]
        fields = {**fields, **({"num_labels": 3} if task == "classification" else {}), **config}
        auto = "AutoModelForCausalLM" if task == "lm" else "AutoModelForSequenceClassification"
        auto = _HEADS[task].get(family, auto)
        torch.manual_seed(len(family))
        model = getattr(transformers, auto).from_config(getattr(transformers, name)(**fields)).eval()
        with torch.no_grad():  # far from the small, symmetric initial values: no bias is zero, no norm is one
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        if dtype == "bf16":
            return model.to(torch.bfloat16)
        return model if dtype == "fp32" else self._quantized(model, dtype)

    def _quantized(self, model: Any, dtype: str) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        from compose.base.quantization import keep_differentiable

        options = {
            "nf4": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.float32,
            },
            "int8": {"load_in_8bit": True},
        }
        place = self._directory / f"{len(self._made)}"
        model.save_pretrained(place)
        held = type(model).from_pretrained(place, quantization_config=BitsAndBytesConfig(**options[dtype])).eval()
        keep_differentiable(held)  # as compose.load does
        return held

    # -- batches ---------------------------------------------------------------------------------------------------

    def rows(self, *lengths: int, seed: int = 0) -> list[Any]:
        """Random token ids, one tensor a row, none of them special."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(4, VOCABULARY, (n,), generator=generator) for n in lengths]

    def batch(self, family: str, rows: list[Any], side: str = "right") -> dict[str, Any]:
        """Rows padded on one side, with the position ids that ``generate`` would pass, and targets for T5."""
        import torch

        longest = max(len(row) for row in rows)
        pads = [torch.full((longest - len(row),), PAD) for row in rows]
        ids = [torch.cat((pad, row) if side == "left" else (row, pad)) for pad, row in zip(pads, rows, strict=True)]
        batch = {"input_ids": torch.stack(ids)}
        batch["attention_mask"] = (batch["input_ids"] != PAD).long()
        if family in (*_CAUSAL, "bert"):
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        if family == "t5":
            targets = [torch.arange(4, 8) + int(row[0]) % 40 for row in rows]
            batch["decoder_input_ids"] = torch.stack(targets)
        return batch

    def logits(self, model: Any, batch: dict[str, Any], **options: Any) -> list[Any]:
        """The logits of each row's own tokens, padding left out, in float32."""
        import torch

        with torch.no_grad():
            out = model(**batch, **options).logits.float()
        mask = batch["attention_mask"].bool()
        if "decoder_input_ids" in batch or out.dim() == 2:
            return list(out)
        return [row[kept] for row, kept in zip(out, mask, strict=True)]

    # -- adapters --------------------------------------------------------------------------------------------------

    def options(self, kind: str, size: int = 0) -> dict[str, Any]:
        """Test-sized options for a kind: what its config calls its size, a little different for each ``size``."""
        from compose.kind.registry import get_kind

        wanted = {"r": 4 - size, "lora_alpha": 6.0, "num_virtual_tokens": 3 - size, "bottleneck_size": 8 - 2 * size}
        wanted |= {"density": 0.2 - 0.1 * size, "intrinsic_dimension": 40 - 8 * size}
        return {name: value for name, value in wanted.items() if name in get_kind(kind).Config.model_fields}

    def adapter(
        self, model: Any, kind: str, name: str, *, seed: int = 1, size: int = 0, noise: float = 0.3, **options: Any
    ) -> Any:
        """A resident adapter whose parameters are ``noise`` away from their initial values, in train mode or not."""
        import torch

        from compose.kind.registry import get_kind, make_config
        from compose.runtime.model_runtime import runtime

        cls, home = get_kind(kind), runtime(model)
        config = make_config(cls, {**self.options(kind, size), **options})
        adapter = home.add(name, cls(config, home.sites, model, name=name, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator).to(parameter)
        return adapter


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def close():
    """Compare lists of logits within what the dtype can hold: relative to the largest of them."""
    import torch

    def check(ours: Any, theirs: Any, dtype: str = "fp32", *, factor: float = 1.0) -> None:
        assert len(ours) == len(theirs)
        bound = {"fp32": 2e-5, "nf4": 1e-4, "bf16": 6e-2}[dtype] * factor
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.shape == b.shape, f"row {i}: {tuple(a.shape)} and {tuple(b.shape)}"
            gap, size = (a - b).abs().max().item(), max(1.0, b.abs().max().item())
            assert gap <= bound * size, f"row {i} differs by {gap:.2e} (largest value {size:.1f})"
            assert torch.isfinite(a).all()

    return check
