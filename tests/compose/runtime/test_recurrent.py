"""Models that keep a state: prompts enter it once, whatever its name, and rows of unlike prompts stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

import compose
from compose.errors import KindError

TEXT = {"vocab_size": 96, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO, FOUR = {**TEXT, "num_hidden_layers": 2}, {**TEXT, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48, "num_key_value_heads": 2}
STATES = {"state_size": 4, "time_step_rank": 4}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2}
ZAMBA = {"num_attention_heads": 4, "intermediate_size": 48, "num_mem_blocks": 1}
ZAMBA |= {"mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 2, "mamba_headdim": 32}
MODELS = {
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**TWO, **STATES)),
    "mamba2": lambda: T.Mamba2ForCausalLM(T.Mamba2Config(**TWO, state_size=4, num_heads=8, head_dim=8, n_groups=1)),
    "falcon_mamba": lambda: T.FalconMambaForCausalLM(T.FalconMambaConfig(**TWO, **STATES)),
    "rwkv": lambda: T.RwkvForCausalLM(T.RwkvConfig(**TWO, attention_hidden_size=32, intermediate_size=48)),
    "recurrent_gemma": lambda: T.RecurrentGemmaForCausalLM(
        T.RecurrentGemmaConfig(
            **{**TWO, "num_hidden_layers": 3},
            num_attention_heads=4,
            intermediate_size=48,
            lru_width=32,
            attention_window_size=16,
        )
    ),
    "jamba": lambda: T.JambaForCausalLM(T.JambaConfig(**FOUR, **HEADS, **JAMBA)),
    "zamba2": lambda: T.Zamba2ForCausalLM(
        T.Zamba2Config(**FOUR, **ZAMBA, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"])
    ),
    "falcon_h1": lambda: T.FalconH1ForCausalLM(
        T.FalconH1Config(**TWO, **HEADS, **{**SSM, "mamba_n_heads": 4}, mamba_d_ssm=32)
    ),
    "lfm2": lambda: T.Lfm2ForCausalLM(T.Lfm2Config(**TWO, **HEADS, full_attn_idxs=[1], block_multiple_of=8)),
    "qwen3_next": lambda: T.Qwen3NextForCausalLM(
        T.Qwen3NextConfig(**FOUR, **HEADS, head_dim=8, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16)
    ),
}
COUNTS_NOTHING = {"mamba", "mamba2", "falcon_mamba", "rwkv"}  # all of whose layers are recurrent
TAKES_FILLING = {"rwkv", "recurrent_gemma"}


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made


families = pytest.mark.parametrize("model", MODELS, indirect=True)


def prompt(model, name, n, seed=1):
    adapter = compose.create(model, "prompt", {"num_virtual_tokens": n}, name=name)
    with torch.no_grad():
        adapter.at("", "P").copy_(torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)))
    return adapter.freeze()


def ids(model, rows=2, length=6):
    """Random tokens. RWKV as transformers has it goes on with one row only."""
    rows = 1 if model.config.model_type == "rwkv" else rows
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def steps(model, tokens, split) -> torch.Tensor:
    """Logits of a text that is read up to ``split`` at once and then token by token."""
    alone = model.config.model_type in COUNTS_NOTHING
    held: dict[str, Any] = {} if alone else {"past_key_values": T.DynamicCache(config=model.config)}
    pieces, end = [], 0
    for piece in (tokens[:, :split], *tokens[:, split:].split(1, dim=1)):
        end += piece.shape[1]
        mask = {} if alone else {"attention_mask": torch.ones_like(tokens[:, :end])}
        out = model(input_ids=piece, use_cache=True, **mask, **held)
        pieces.append(out.logits)
        held |= {name: out[name] for name in ("cache_params", "state") if out.get(name) is not None}
    return torch.cat(pieces, dim=1)


@families
def test_a_prompt_enters_once(model):
    """Cached = uncached."""
    prompt(model, "p", 3)
    tokens = ids(model, length=9)
    bare = steps(model, tokens, 6)
    compose.activate(model, "p")
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(steps(model, tokens, 6), whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(steps(model, tokens, 8), whole, atol=1e-3, rtol=1e-3)
    assert (whole - bare).abs().max() > 0.1


@families
def test_generate_makes_the_tokens_of_the_whole_text(model):
    prompt(model, "p", 3)
    compose.activate(model, "p")
    tokens = ids(model)
    made = model.generate(input_ids=tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = steps(model, made, 6)[:, 5:-1].clone()
        logits[..., model.generation_config.eos_token_id] = -torch.inf
    chosen = logits.gather(2, made[:, 6:, None])[..., 0]
    assert (logits.amax(2) - chosen).abs().max() < 1e-4


@families
def test_rows_of_unlike_prompts(model):
    prompt(model, "p", 3), prompt(model, "q", 1, seed=2)
    if model.config.model_type in TAKES_FILLING:
        tokens = ids(model)
        compose.activate(model, "p")
        with torch.no_grad():
            before = model(input_ids=tokens).logits
            for rows in (["p", "q", None], ["p", None]):
                with pytest.raises(KindError, match="prompts of unlike lengths cannot stand side by side"):
                    compose.activate(model, rows)
            torch.testing.assert_close(model(input_ids=tokens).logits, before)  # what was active is
        return
    tokens, alone = ids(model, rows=3, length=8), []
    for row, expr in enumerate(("p", "q", None)):
        compose.activate(model, expr)
        alone.append(steps(model, tokens[row : row + 1], 6))
    compose.activate(model, ["p", "q", None])
    torch.testing.assert_close(steps(model, tokens, 6), torch.cat(alone), atol=1e-3, rtol=1e-3)


@families
def test_side_networks_remember(model):
    """A ladder attends to the tokens before: its keys and values go into the model's cache, whatever that is called."""
    adapter = compose.create(model, "ladder", {"reduction_factor": 4}, name="l")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    adapter.freeze()
    compose.activate(model, "l")
    tokens = ids(model, length=9)
    if model.config.model_type == "rwkv":
        with pytest.raises(KindError, match="'state' has no place"):
            steps(model, tokens, 6)
        return
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(steps(model, tokens, 6), whole, atol=2e-4, rtol=2e-4)


def test_what_has_a_value_for_each_token_is_named():
    model = T.XLNetLMHeadModel(T.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval()
    prompt(model, "p", 2)
    compose.activate(model, "p")
    with pytest.raises(KindError, match="'perm_mask'"):
        model.generate(input_ids=ids(model), max_new_tokens=2)
    with torch.no_grad():
        mems = model(input_ids=ids(model), use_mems=True).mems
        with pytest.raises(KindError, match="'mems'"):
            model(input_ids=ids(model), mems=mems)


def test_half_precision_is_not_taken_for_an_effect():
    for name in ("mamba", "qwen3_next"):
        torch.manual_seed(0)
        model = MODELS[name]().eval().to(torch.bfloat16)
        prompt(model, "p", 3), prompt(model, "q", 1)
        compose.activate(model, ["p", "q"])
        model(input_ids=ids(model))
