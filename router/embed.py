"""Rows as vectors: the bare base's hidden states, or counts of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from router.bench import Batch
from router.fold import active


@torch.no_grad()
def hidden_means(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean over a row's real tokens of the bare base's last hidden states, of unit length: (B, d) float32.

    What is active in the model does not matter and stays active. An encoder-decoder is read by its encoder.
    """
    reader = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with active(model, [None]):
        states = reader(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
    mask = batch.attention_mask[..., None].to(states.dtype)  # (B, T, 1)
    return F.normalize((states * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1)


def token_counts(batch: Batch, vocabulary: int) -> Tensor:
    """How often each token stands in each row: (B, V)."""
    counts = torch.zeros(len(batch), vocabulary, device=batch.input_ids.device)
    return counts.scatter_add(1, batch.input_ids, batch.attention_mask.to(counts.dtype))
