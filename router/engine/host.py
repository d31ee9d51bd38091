"""The base of an engine: loaded once, with its tokenizer, its limits and the places of heads."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import compose
from compose.base.location import locate
from compose.base.model import identity_of, load_base, name_of, tokenizer_of
from compose.base.quantization import quantization_of
from compose.expr.tree import Expr
from compose.runtime.composition import Composition
from compose.runtime.model_runtime import runtime
from router.engine.grammar import Grammars
from router.engine.pooling import pooling_of
from router.engine.row_heads import Heads
from router.ensemble.experts import context_of

_RECENT = 4  # compositions that are gone back to; each holds what was laid out for it
_PLAIN = {"full_attention", "sliding_attention"}  # attention that a mask over columns describes wherever they begin


class Host:
    """A frozen base that adapters are made resident on.

    Attributes
    ----------
    model, tokenizer
        Those of transformers. `encoder` is a tokenizer for any thread that holds the lock `encoding`.
    decodes, translates
        Whether it can write (a causal language model, an encoder-decoder) or only classify (an encoder), and whether
        what it writes answers a text that an encoder has read.
    held, quantized
        How its weights are held: quantization and dtype; whether there is a quantization.
    given
        What it was loaded from; None for a model in memory.
    context, vocabulary, width
        Tokens it reads at most, or None; tokens that its logits tell apart; numbers of a text's vector.
    grammars, pooling
        What continuations may be asked to look like; how a text's states become its vector.
    is_plain
        Whether a cache of its texts can be cut, joined and filled in pieces: every layer is attention over columns.
    """

    def __init__(
        self,
        base: str | Path | PreTrainedModel,
        *,
        quantize: str = "none",
        dtype: Any = None,
        device: Any = None,
        tokenizer: Any = None,
    ) -> None:
        task = None if isinstance(base, PreTrainedModel) else _task(base)
        self.model = load_base(base, quantize=quantize, dtype=dtype, device=device, task=task)
        self.tokenizer = tokenizer or tokenizer_of(base)
        self.encoder, self.encoding = (
            copy.deepcopy(self.tokenizer),
            Lock(),
        )  # other threads encode while this one decodes
        self.identity = identity_of(self.model)
        self.name = name_of(self.model)
        self.held = f"{quantization_of(self.model)} {self.model.dtype}"
        self.quantized = quantization_of(self.model) != "none"
        self.given = None if isinstance(base, PreTrainedModel) else base
        self.decodes = self.model.can_generate()
        self.translates = self.decodes and bool(self.model.config.is_encoder_decoder)
        self.heads = Heads(self.model)
        self.heads.graft()  # before the runtime, which knows the modules it found
        self.runtime = runtime(self.model)
        self.backbone = self.model.base_model
        self._takes = set(inspect.signature(self.model.forward).parameters)
        self.context = _context(self.model)
        text = self.model.config.get_text_config(decoder=True)
        self.vocabulary, self.width = int(text.vocab_size), int(getattr(text, "hidden_size", 0))
        self.grammars = Grammars(self.encoder, self.vocabulary, self.ends)
        self.pooling = pooling_of(self.model, decodes=self.decodes)
        self.is_plain = self.decodes and not self.translates and _is_plain(self.model)
        self._active: object = None  # rows of expressions, or what made something else active
        self._recent: OrderedDict[object, Composition] = OrderedDict()

    @property
    def pad(self) -> int:
        """A token for places that are masked."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        config = getattr(self.model, "generation_config", None)
        tokens = getattr(config, "eos_token_id", None)
        tokens = self.tokenizer.eos_token_id if tokens is None else tokens
        return frozenset(tokens if isinstance(tokens, list) else [] if tokens is None else [tokens])

    @property
    def starts(self) -> list[int]:
        """Tokens that an encoder-decoder's answer begins with: they are given, and not part of the text."""
        config = self.model.generation_config
        tokens = [config.decoder_start_token_id, config.forced_bos_token_id]
        return [token for token in tokens if token is not None] or [self.pad]

    def takes(self, **options: Any) -> dict[str, Any]:
        """Those options that the model's forward has."""
        return {name: value for name, value in options.items() if name in self._takes}

    def activate(self, rows: Sequence[Expr]) -> None:
        """Make one composition per row active, unless just these are."""
        wanted = tuple(rows) if len(set(rows)) > 1 else tuple(rows[:1])
        self._make_active(wanted, lambda: self.runtime.activate(wanted, {}))  # planned once, in `Targets`

    def activate_by(self, gate: object, activate: Callable[[PreTrainedModel], None]) -> None:
        """Make active what a gate does, unless it is."""
        self._make_active(gate, lambda: activate(self.model))

    def _make_active(self, wanted: object, activate: Callable[[], object]) -> None:
        if wanted == self._active:
            return
        self._active = None
        recent = self._recent.pop(wanted, None)
        if recent is None or not self.runtime.activate_again(recent):
            with torch.inference_mode(False), torch.no_grad():  # a merge makes an adapter, which outlives this call
                activate()
        # Those that take turns are gone back to at every step, and what they have laid out is still good.
        self._recent[wanted] = self.runtime.composition
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        self._active = wanted

    @contextmanager
    def in_hand(self) -> Iterator[None]:
        """Own the base: nobody else may use it until the end."""
        with self.runtime.owned_by("an Engine"):
            self.forget()
            yield

    def forget(self) -> None:
        """Something else may have become active."""
        self._active = None
        self._recent.clear()

    def rest(self) -> None:
        """Make nothing active."""
        compose.activate(self.model, None)
        self.forget()


def _task(base: str | Path) -> str:
    """What to load a base as: whatever it was saved as, a decoder to generate and an encoder to classify."""
    where = locate(base)
    kind = AutoConfig.from_pretrained(where.directory, local_files_only=True).model_type
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    return "classification" if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal_lm"


def _is_plain(model: PreTrainedModel) -> bool:
    types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or _PLAIN)
    layers = DynamicCache(config=model.config).layers
    return (
        bool(layers) and types <= _PLAIN and all(type(a) in (DynamicLayer, DynamicSlidingWindowLayer) for a in layers)
    )


def _context(model: PreTrainedModel) -> int | None:
    """Positions for text: RoBERTa and OPT count theirs from behind the padding's."""
    positions = context_of(model)
    if positions is None or model.config.model_type not in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        return positions
    return positions - int(model.config.pad_token_id) - 1
