"""Where the named sites of each transformer family are.

One row per family: module-path suffix inside a block -> neutral role. Roles are ``attn.{q,k,v,o,qkv}``,
``cross.{q,k,v,o}`` (cross-attention) and ``mlp.{gate,up,gate_up,down}``; ``embed`` and ``position`` name modules
outside the blocks. A family that is not listed here is read by :func:`guess_role`, from the names its linears carry.
``FUSED`` says which rows of a fused linear are whose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

_LLAMA = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_BERT = {
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.o",
    "crossattention.self.query": "cross.q",
    "crossattention.self.key": "cross.k",
    "crossattention.self.value": "cross.v",
    "crossattention.output.dense": "cross.o",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
}
_T5 = {
    "SelfAttention.q": "attn.q",
    "SelfAttention.k": "attn.k",
    "SelfAttention.v": "attn.v",
    "SelfAttention.o": "attn.o",
    "EncDecAttention.q": "cross.q",
    "EncDecAttention.k": "cross.k",
    "EncDecAttention.v": "cross.v",
    "EncDecAttention.o": "cross.o",
    "DenseReluDense.wi": "mlp.up",
    "DenseReluDense.wi_0": "mlp.gate",
    "DenseReluDense.wi_1": "mlp.up",
    "DenseReluDense.wo": "mlp.down",
}
_BART = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.o",
    "encoder_attn.q_proj": "cross.q",
    "encoder_attn.k_proj": "cross.k",
    "encoder_attn.v_proj": "cross.v",
    "encoder_attn.out_proj": "cross.o",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
}
_NEOX = {
    "attention.query_key_value": "attn.qkv",
    "attention.dense": "attn.o",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
_BLOOM = {
    "self_attention.query_key_value": "attn.qkv",
    "self_attention.dense": "attn.o",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
_GPT2 = {
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.o",
    "crossattention.q_attn": "cross.q",
    "crossattention.c_attn": "cross.kv",
    "crossattention.c_proj": "cross.o",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
_GLM = {
    **{k: v for k, v in _LLAMA.items() if v.startswith("attn.")},
    "mlp.gate_up_proj": "mlp.gate_up",
    "mlp.down_proj": "mlp.down",
}

FAMILIES: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi": {
        **{k: v for k, v in _LLAMA.items() if v in ("attn.q", "attn.k", "attn.v")},
        "self_attn.dense": "attn.o",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    },
    "phi3": {
        "self_attn.qkv_proj": "attn.qkv",
        "self_attn.o_proj": "attn.o",
        "mlp.gate_up_proj": "mlp.gate_up",
        "mlp.down_proj": "mlp.down",
    },
    "glm": _GLM,
    "glm4": _GLM,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": _NEOX,
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "mpt": {
        "attn.Wqkv": "attn.qkv",
        "attn.out_proj": "attn.o",
        "ffn.up_proj": "mlp.up",
        "ffn.down_proj": "mlp.down",
    },
    "opt": _BART,
    "bart": _BART,
    "whisper": _BART,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": {
        "attention.self.query_proj": "attn.q",
        "attention.self.key_proj": "attn.k",
        "attention.self.value_proj": "attn.v",
        "attention.output.dense": "attn.o",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
    },
    "albert": {
        "attention.query": "attn.q",
        "attention.key": "attn.k",
        "attention.value": "attn.v",
        "attention.dense": "attn.o",
        "ffn": "mlp.up",
        "ffn_output": "mlp.down",
    },
    "distilbert": {
        "attention.q_lin": "attn.q",
        "attention.k_lin": "attn.k",
        "attention.v_lin": "attn.v",
        "attention.out_lin": "attn.o",
        "ffn.lin1": "mlp.up",
        "ffn.lin2": "mlp.down",
    },
    "modernbert": {"attn.Wqkv": "attn.qkv", "attn.Wo": "attn.o", "mlp.Wi": "mlp.gate_up", "mlp.Wo": "mlp.down"},
    "t5": _T5,
    "mt5": _T5,
    "vit": {
        "attention.q_proj": "attn.q",
        "attention.k_proj": "attn.k",
        "attention.v_proj": "attn.v",
        "attention.o_proj": "attn.o",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
        **_BERT,
    },
}

# -- fused linears -------------------------------------------------------------------------------------------------

Shares: TypeAlias = tuple[int, ...]
Cut: TypeAlias = Callable[[Any], tuple[int, Shares]]  # from a config: into how many equal runs, the shares of each

PARTS: Mapping[str, tuple[str, ...]] = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "cross.kv": ("cross.k", "cross.v"),
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
}


def _end_to_end(config: Any) -> tuple[int, Shares]:
    """[q | k | v], with fewer heads of k and v where they are grouped."""
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    return 1, (heads, grouped, grouped)


def _by_head(config: Any) -> tuple[int, Shares]:
    """Head after head, each with its own [q | k | v]."""
    return config.num_attention_heads, (1, 1, 1)


def _falcon(config: Any) -> tuple[int, Shares]:
    """Group after group, each with its heads of q and one head of k and of v; or as above."""
    if config.new_decoder_architecture:
        return config.num_kv_heads, (config.num_attention_heads // config.num_kv_heads, 1, 1)
    return (1, (config.num_attention_heads, 1, 1)) if config.multi_query else _by_head(config)


def _bigcode(config: Any) -> tuple[int, Shares]:
    return (1, (config.num_attention_heads, 1, 1)) if config.multi_query else _by_head(config)


def _halves(_config: Any) -> tuple[int, Shares]:
    return 1, (1, 1)


# How the rows of a family's fused linears are shared among their parts, in the order of PARTS.
FUSED: Mapping[str, Mapping[str, Cut]] = {
    "gpt2": {"attn.qkv": _end_to_end, "cross.kv": _halves},
    "gpt_bigcode": {"attn.qkv": _bigcode},
    "gpt_neox": {"attn.qkv": _by_head},
    "bloom": {"attn.qkv": _by_head},
    "falcon": {"attn.qkv": _falcon},
    "mpt": {"attn.qkv": _end_to_end},
    "phi3": {"attn.qkv": _end_to_end, "mlp.gate_up": _halves},
    "glm": {"mlp.gate_up": _halves},
    "glm4": {"mlp.gate_up": _halves},
    "modernbert": {"attn.qkv": _end_to_end, "mlp.gate_up": _halves},
}

# Linears whose weight the module around them reads itself, as (its class, their name): their forward never runs, so
# nothing acts there unasked.
UNCALLED = frozenset(
    [
        ("MultiheadAttention", "out_proj"),  # of torch
        *((f"{family}Mixer", "dt_proj") for family in ("Mamba", "FalconMamba", "JambaMamba")),
        *(("WavLMAttention", name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    ]
)

# Suffixes of the modules that turn position ids into embeddings or rotations.
POSITIONS = ("rotary_emb", "wpe", "position_embeddings", "embed_positions", "rotary_emb_local")

_NAMES: Mapping[str, tuple[str, ...]] = {
    "attn.q": ("q_proj", "query", "q", "q_lin", "to_q", "wq", "query_proj"),
    "attn.k": ("k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj"),
    "attn.v": ("v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj"),
    "attn.qkv": ("qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "in_proj"),
    "attn.o": ("o_proj", "out_proj", "o", "out_lin", "to_out", "wo_attn"),
    "mlp.gate": ("gate_proj", "w1", "wi_0"),
    "mlp.gate_up": ("gate_up_proj",),
    "mlp.up": ("up_proj", "fc1", "c_fc", "wi", "w3", "wi_1", "dense_h_to_4h", "lin1", "fc_in"),
    "mlp.down": ("down_proj", "fc2", "wo", "w2", "dense_4h_to_h", "lin2", "fc_out"),
}


_CROSS = ("cross", "encoder_attn", "encoder_attention", "encdec", "src_attn")


def guess_role(suffix: str) -> str | None:
    """Role of a linear whose family is unknown, from the last part of its path; ``None`` if the name says nothing.

    Cross-attention is recognised by what its module is called.
    """
    last = suffix.rsplit(".", 1)[-1].lower()
    for role, names in _NAMES.items():
        if last in names:
            crossing = any(word in suffix.lower() for word in _CROSS)
            return role.replace("attn.", "cross.") if crossing else role
    return None
