"""A base without its weights: every module and shape is there, no number is, so a composition is tried before it loads.

The model is built of fake tensors (``torch``'s own, which know shape, dtype and device only). Adapters are built on it
by the code that reads real ones, activated by the code that activates real ones, and run: what does not fit says so
here, and the matrix products of a forward are counted rather than guessed. A 7B model takes a second and no memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from compose.algebra import normalize
from compose.base.loading import model_class, model_config, quiet_transformers, saved_task
from compose.base.location import Location, locate
from compose.base.quantization import stays_dense
from compose.base.request import BaseRequest
from compose.base.sites import SiteMap
from compose.expr.tree import Call, Expr, Scale, Seq, add, seq
from compose.formats.directory import of_the_base, on_its_vocabulary, our_keys, parse_config
from compose.function import bind, get_function
from compose.kind.adapter import Adapter
from compose.kind.registry import get_kind, make_config
from compose.parameter_space.deltas import DENSE_BUDGET
from compose.parameter_space.execute import Merged, resolve
from compose.parameter_space.method import Elementwise, get_method, need_data
from compose.planning.members import StoredAdapter
from compose.runtime.model_runtime import activate, runtime
from compose.runtime.row_trials import FAILURES
from hub.errors import GateError

__all__ = ["FakeBase"]

TOKENS = 128  # length of the text that is counted
_BLOCK = {"nf4": 64, "nested": 256}  # bitsandbytes: values that share an absmax, absmax values that share one
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn}


class FakeBase:
    """The shapes of one base, and of the adapters put on it.

    Parameters
    ----------
    base
        As for :func:`compose.load`. A Hugging Face id needs only its config.json here.
    task, labels, quantize, double_quant, dtype
        As for :func:`compose.load`. Quantization changes what :meth:`bytes` says, not the shapes.

    Raises
    ------
    HubError
        No such base, an unknown option, or a model without sites.
    """

    def __init__(self, base: str | Path, **options: Any) -> None:
        self.request = BaseRequest(**{"dtype": None, **options})
        self.where: Location = locate(base, files=("config.json",))
        with quiet_transformers():
            config = model_config(self.where.directory, self.request)
            self.task = self.request.task or saved_task(config)
            auto = model_class(config, self.request, self.where.directory)
            self._dense = stays_dense(auto, config, trust_remote_code=False)
            dtype = self.request.torch_dtype or getattr(config, "dtype", None) or torch.float32
            self._mode = FakeTensorMode(allow_non_fake_inputs=True)
            try:
                with self._building():
                    model = auto.from_config(config, dtype=dtype, attn_implementation="eager").eval()
                    model.tie_weights()
            except DataDependentOutputException as error:  # as of ConvNeXt, whose layers ask a tensor for numbers
                raise GateError(
                    f"{self.where.name} ({config.model_type}) cannot be built without weights to try adapters on it",
                    path=self.where.directory,
                    hint="publish with --no-trial",
                ) from error
            self.model: PreTrainedModel = model
        self.sites = SiteMap(self.model)
        self.base_parameters = sum(p.numel() for p in self.model.parameters())
        self.bytes = self._count_bytes()  # of the weights, held as the request says
        self.runtime = runtime(self.model)
        self._counted: dict[Expr, int | None] = {}
        self.merged: dict[str, Adapter] = {}  # what merges make when they are activated, by their text

    @contextmanager
    def _building(self) -> Iterator[None]:
        with self._mode, no_init_weights(), torch.no_grad():
            yield

    # -- adapters ------------------------------------------------------------------------------------------------------

    def put(self, name: str, stored: StoredAdapter) -> Adapter:
        """Build the adapter that a leaf holds under ``name``, from its config and the headers of its files.

        Raises
        ------
        KindError, SiteError
            A kind or an option that this base cannot carry, or tensors that do not fit: by name.
        """
        kind, config = parse_config(stored.config, self.sites)
        with self._building():
            shapes: Mapping[str, Tensor] = {
                key: torch.empty(info.shape, dtype=_DTYPES[info.dtype]) for key, info in stored.tensors.items()
            }
            fresh = kind(config, self.sites, self.model, name=name)
            adapter, shapes = on_its_vocabulary(fresh, shapes, self.sites, self.model)
            # Copies of the base's own weights are compared when they are read; here they have no values.
            copies = of_the_base(shapes, adapter, self.sites)
            own = {k: v for k, v in shapes.items() if k not in copies or not self._has(k, v.shape, *copies[k])}
            adapter.load_state(our_keys(adapter, own, self.model))
        return self._keep(name, adapter.freeze())

    def _has(self, key: str, shape: torch.Size, path: str, name: str) -> bool:
        """Whether a key is of a copy of what the base has there."""
        own = self.model.get_submodule(path).state_dict().get(name) if path in self.sites.modules else None
        return ".base_layer." in key or (own is not None and own.shape == shape)

    def _keep(self, name: str, adapter: Adapter) -> Adapter:
        self._counted.clear()
        adapter.name = name
        self.runtime.adapters[name] = adapter
        return adapter

    # -- cost ----------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the base is called in manifests."""
        return self.where.name

    @property
    def length(self) -> int:
        """Tokens of the text whose forward is counted; 1 for a model that reads no text."""
        if self.model.main_input_name != "input_ids":
            return 1
        most: int = getattr(self.sites.config, "max_position_embeddings", None) or 2 * TOKENS
        return min(TOKENS, most // 2)

    @cached_property
    def base_flops(self) -> int | None:
        """Floating-point operations in matrix products of one forward of the bare base; None: it cannot be counted.

        A forward that looks at values (experts chosen by a router inside the model) does not run on shapes.
        """
        activate(self.model, None)
        return self._flops()

    def activate(self, expr: Expr) -> bool:
        """Make ``expr`` active, as far as shapes go; each part of an ensemble in turn.

        Returns
        -------
        False where some kind looks at values when it is activated: then only loading can tell.

        Raises
        ------
        KindError
            Whatever activation refuses: a combination that no site can carry.
        """
        if isinstance(expr, Call) and get_function(expr.function).family == "ensemble":
            return all(self.activate(arg) for arg in expr.args)
        lowered = normalize(resolve(self.runtime, normalize(_weighed(expr)), {}, self._stand_in))
        try:
            activate(self.model, lowered)
        except RuntimeError:  # torch's, as in _stand_in
            activate(self.model, None)
            return False
        return True

    def added_flops(self, expr: Expr) -> int | None:
        """Floating-point operations in matrix products that ``expr`` adds to one forward, in all; None as above.

        An ensemble runs the model once for each of its members, folded into the batch; a merge that makes a new
        adapter counts as that adapter. Raises as :meth:`activate`.
        """
        if expr not in self._counted:
            self._counted[expr] = self._count(expr)
        return self._counted[expr]

    def _count(self, expr: Expr) -> int | None:
        base = self.base_flops
        if base is None:
            return None
        if isinstance(expr, Call) and get_function(expr.function).family == "ensemble":
            parts = [self.added_flops(arg) for arg in expr.args]
            known = [part for part in parts if part is not None]
            return sum(known) + (len(parts) - 1) * base if len(known) == len(parts) else None
        if not self.activate(expr):
            return None
        self._flops()  # factors are gathered in the first call, and kept
        total = self._flops()
        activate(self.model, None)
        return None if total is None else total - base

    def makes_adapter(self, call: Call) -> bool:
        """Whether a merge makes a new adapter when it is activated; else it is a weighted sum in the forward."""
        merges: list[Call] = []
        resolve(self.runtime, call, {}, lambda inner, _: merges.append(inner))
        return call in merges

    def _stand_in(self, call: Call, make: Callable[[], Merged]) -> None:
        """Shapes of the adapter that a merge will make: its own, or where it looks at values, those it must have."""
        if str(call) in self.merged:
            return
        try:
            with self._building():
                adapter = self._shaped_like(call) if need_data(call) else make().adapter
        except RuntimeError:  # torch's: a fake tensor has no values. What is wrong with the merge is a HubError
            adapter = self._shaped_like(call)
        self.merged[str(call)] = self._keep(str(call), adapter)

    def _shaped_like(self, call: Call) -> Adapter:
        members = [self.runtime.adapters[name] for name in call.refs]
        if self._stays_whole(call, members):
            return self._dense_at(tuple(dict.fromkeys(path for m in members for path in m.paths)), str(call))
        ranks = [int(rank) for m in members if (rank := getattr(m.config, "r", None))]
        if len(ranks) < len(members):
            return members[0]
        paths = tuple(dict.fromkeys(path for m in members for path in m.paths))
        most = min(min(self.sites[path].in_features, self.sites[path].out_features) for path in paths)
        rank = min(getattr(bind(call), "rank", None) or sum(ranks), most)
        kind = get_kind("lora")
        with self._building():
            config = make_config(kind, {"r": rank, "lora_alpha": rank, "target_modules": paths})
            return kind(config, self.sites, self.model, name=str(call)).freeze()

    def _stays_whole(self, call: Call, members: Sequence[Adapter]) -> bool:
        """Whether the merge of these has a higher rank than its members, and is small enough to be held so."""
        method, options = get_method(call.function), bind(call)
        if not isinstance(method, Elementwise) or getattr(options, "rank", None) is not None:
            return False
        sites = {path: self.sites[path] for m in members for path in m.paths if path in self.sites.paths}
        whole = sum(4 * site.in_features * site.out_features for site in sites.values())
        return all(m.averages_in_weight for m in members) and whole <= DENSE_BUDGET

    def _dense_at(self, paths: tuple[str, ...], name: str) -> Adapter:
        kind = get_kind("dense")
        with self._building():
            config = make_config(kind, {"target_modules": paths, "biases": False})
            return kind(config, self.sites, self.model, name=name).freeze()

    def _flops(self) -> int | None:
        inputs = self._inputs()
        if inputs is None:
            return None
        log = logging.getLogger(FakeTensorMode.__module__)
        log.disabled, before = True, log.disabled
        try:
            with (
                quiet_transformers(),
                torch.no_grad(),
                FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter,
            ):
                self.model(**inputs)
        except FAILURES:  # some operation needs values, or the model other inputs. What adapters do is a HubError
            return None
        finally:
            log.disabled = before
        return int(counter.get_total_flops())

    def _inputs(self) -> dict[str, Tensor] | None:
        """A text, an image or a sound of zeros; None where it is not known what the model reads."""
        name, config = self.model.main_input_name, self.model.config
        shapes: Mapping[str, Callable[[], tuple[int, ...]]] = {
            "input_ids": lambda: (1, self.length),
            "pixel_values": lambda: (1, config.num_channels, *_pair(config.image_size)),
            "input_features": lambda: (1, config.num_mel_bins, 2 * config.max_source_positions),
        }
        if name not in shapes:
            return None
        dtype = torch.long if name == "input_ids" else self.model.dtype
        inputs = {name: torch.zeros(shapes[name](), dtype=dtype)}
        if self.sites.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(1, self.length, dtype=torch.long)
        return inputs

    def _count_bytes(self) -> int:
        total: int = sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))
        if self.request.quantize == "none":
            return total
        for module in self._quantized():
            weight = cast("Tensor", module.weight)
            rows = weight.shape[1 if isinstance(module, Conv1D) else 0]
            total += self._packed(weight.numel(), rows) - weight.numel() * weight.element_size()
        return total

    def _quantized(self) -> Iterator[nn.Module]:
        kept = [*self._dense, *(getattr(self.model, "_keep_in_fp32_modules", None) or ())]
        for path, module in self.model.named_modules():
            parts = f".{path}."
            if type(module) in (nn.Linear, Conv1D) and not any(f".{name}." in parts for name in kept):
                yield module

    def _packed(self, n: int, rows: int) -> int:
        """Bytes of a quantized weight of n numbers: codes, scales: :func:`compose.base.loading.bits_per_parameter`."""
        if self.request.quantize == "int8":
            return n + 4 * rows
        blocks = math.ceil(n / _BLOCK["nf4"])
        scales = blocks + 4 * math.ceil(blocks / _BLOCK["nested"]) + 4 if self.request.double_quant else 4 * blocks
        return math.ceil(n / 2) + scales


def _product(_into: Sequence[int], a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    """Operations of a product (..., m, k) x (..., k, n) that is added to something."""
    return 2 * math.prod(a) * b[-1]


_IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}  # torch counts the others itself


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _weighed(expr: Expr) -> Expr:
    """Routes as the sum of what they choose from, for shapes: every member may act on some token."""
    if not expr.children:
        return expr
    children = [_weighed(child) for child in expr.children]
    if not isinstance(expr, Call):
        return _with(expr, children)
    family = get_function(expr.function).family
    return add(*children) if family == "route" else Call(expr.function, children, expr.options)


def _with(expr: Expr, children: list[Expr]) -> Expr:
    if isinstance(expr, Scale):
        return Scale(expr.factor, children[0])
    return seq(*children) if isinstance(expr, Seq) else add(*children)
