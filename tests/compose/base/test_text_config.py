"""What a configuration says of its text, in every class of causal language models that transformers has."""

from __future__ import annotations

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compose.base.text_config import fact, fill_pad_id, text_config

NEEDS_MORE = {"gemma4_assistant"}  # cannot be made without the model it assists


@pytest.mark.parametrize("model_type", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NEEDS_MORE))
def test_every_causal_configuration_tells_of_its_text_and_takes_a_padding_token(model_type):
    config = CONFIG_MAPPING[model_type]()
    try:
        inner = config.get_text_config()
    except ValueError:  # it has a text encoder, too
        inner = config.get_text_config(decoder=True)
    assert text_config(config) is inner
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "use_cache"):
        if getattr(inner, name, None) is not None:
            assert fact(config, name) == getattr(inner, name)
    before = fact(config, "pad_token_id")
    fill_pad_id(config, 7)
    for part in (config, inner):
        assert part.pad_token_id is not None
    assert fact(config, "pad_token_id") == (7 if before is None else before)


@pytest.mark.parametrize("config", [{"model_type": "gpt2", "pad_token_id": 5}, {"model_type": "gemma3"}])
def test_a_padding_token_that_is_there_stays(config):
    config = CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})
    text_config(config).pad_token_id = 5
    fill_pad_id(config, 7)
    assert fact(config, "pad_token_id") == 5
