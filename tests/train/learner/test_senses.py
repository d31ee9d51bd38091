"""What trains on a text in a model that also sees: its text model alone, unless places are named."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from compose.runtime.model_runtime import runtime
from train.errors import TrainError
from train.method import get_method
from train.steps.guards import refuse_idle, refuse_looking_ahead


@pytest.fixture
def gemma3():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = T.Gemma3TextConfig(**sizes, vocab_size=61, num_key_value_heads=1, head_dim=8, sliding_window=4)
    sees = T.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    config = T.Gemma3Config(text_config=text, vision_config=sees, mm_tokens_per_image=4, image_token_index=60)
    return T.Gemma3ForConditionalGeneration(config).requires_grad_(False)


def learn(model, learner):
    ids = torch.arange(4, 16).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    refuse_idle(dict(learner.named_parameters()))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "qlora", "bitfit", "bias", "full", "houlsby"])
def test_a_method_s_own_places_are_those_that_read(gemma3, method):
    refuse_looking_ahead(gemma3)  # it is a causal language model
    learner = get_method(method)({}).build(gemma3)
    sites = runtime(gemma3).sites
    assert sites.text == "model.language_model"
    assert learner.paths
    assert ("lm_head" in learner.paths) == (method == "full")  # it is the table of the embeddings
    assert all(sites.reads_text(path) or path == "lm_head" for path in (*learner.paths, *learner.saved))
    learn(gemma3, learner)


def test_places_that_are_named_are_taken_as_they_are_and_told_where_they_idle(gemma3):
    learner = get_method("lora")({"target_modules": ["q_proj"]}).build(gemma3)
    assert len(learner.paths) == 4
    with pytest.raises(TrainError, match=r"4 of 8 parameters get no gradient: .*vision_tower"):
        learn(gemma3, learner)
