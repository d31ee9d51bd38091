"""Instance-wise prompt tuning."""

from __future__ import annotations

from train.method import Method, register


@register("ipt")
class InstanceWisePromptTuning(Method):
    """A prompt of its own for each text, made from the embeddings of its first tokens by a small MLP.

    The base's table of embeddings stays as it is, so that the MLP is all that trains and is stored; `instance: table`
    trains a table of the vocabulary's size instead.
    """

    kind = "prompt"
    paper = "arXiv:2206.01958"
    defaults = {"instance": "mlp"}
