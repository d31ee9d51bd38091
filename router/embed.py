"""Rows as vectors: the bare base's hidden states, or counts of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from router.bench import Batch
from router.ensemble.experts import active


def hidden_means(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean over a row's real tokens of the bare base's last hidden states, of unit length: (B, d) float32.

    What is active in the model does not matter and stays active. An encoder-decoder is read by its encoder.
    """
    return layer_means(model, batch, 1)


@torch.no_grad()
def layer_means(model: PreTrainedModel, batch: Batch, layers: int) -> Tensor:
    """The same of several layers side by side: (B, L d), each layer's mean of unit length.

    `layers` are spread evenly from the last hidden states down to the embeddings; all of them where there are fewer.
    """
    reader = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with active(model, [None]):
        read = reader(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=layers > 1)
    states = read.hidden_states if layers > 1 else (read.last_hidden_state,)
    last, kept = len(states) - 1, min(layers, len(states))
    mask = batch.attention_mask[..., None].float()  # (B, T, 1)
    means = []
    for k in range(kept):
        layer = states[last - (k * last // (kept - 1) if kept > 1 else 0)].float()
        means.append(F.normalize((layer * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1))
    return torch.cat(means, -1)


def token_counts(batch: Batch, vocabulary: int) -> Tensor:
    """How often each token stands in each row: (B, V)."""
    counts = torch.zeros(len(batch), vocabulary, device=batch.input_ids.device)
    return counts.scatter_add(1, batch.input_ids, batch.attention_mask.to(counts.dtype))
