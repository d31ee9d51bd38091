"""Folding a composition into the base's own weights, one tensor at a time: no adapter is left, and no choice either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compose.algebra import normalize, parse
from compose.atoms import Moved
from compose.base.sites import linear_shape
from compose.base.text_config import text_config
from compose.base.weights import bias_of
from compose.errors import KindError
from compose.expr.tree import Call, Expr
from compose.function import bind
from compose.kernels.coefficients import Coefficient
from compose.kind.adapter import Adapter
from compose.kind.tensors import PREFIX
from compose.parameter_space import deltas
from compose.parameter_space.effect import Effect, effect_of
from compose.parameter_space.execute import Workspace, dense_merge, without_merges
from compose.parameter_space.job import Job, Member
from compose.parameter_space.method import get_method
from compose.parameter_space.tensors import merge_heads
from compose.slots.branches import Chain, Mix
from compose.slots.lowering import site_program
from compose.slots.slot import compute_dtype
from compose.slots.stage import Node, Stage


@dataclass(frozen=True)
class Folded:
    """A tensor of the base with the composition in it.

    ``name`` is its name in the base's state dict. ``rounding`` is what writing it in ``value.dtype`` has lost of the
    change, ||cast(W + D) - (W + D)|| / ||D||: near 0 in float32, and not small in bfloat16, where a small change of a
    large weight falls between two numbers.
    """

    name: str
    value: Tensor
    rounding: float


@torch.no_grad()
def fold(model: PreTrainedModel, expr: Expr | str, *, dtype: torch.dtype | None = None) -> Iterator[Folded]:
    """Tensors of the base that a static composition changes, changed: linears, norms, embeddings, and whole modules.

    Parameters
    ----------
    expr
        Over resident adapters; merges in it are carried out.
    dtype
        Of the result; default: what each layer computes in. A quantized layer gives its dequantized weight plus D,
        which is not the weight it had before it was quantized: the result is another base.

    Raises
    ------
    KindError
        An adapter that is no change of weights (bottleneck, prefix, prompt), or a bias that the base has no room for.
    """
    from compose.runtime.model_runtime import runtime

    workspace = Workspace(runtime(model))
    tree = normalize(parse(expr) if isinstance(expr, str) else expr)
    job = dense_merge(workspace, tree)
    if job is not None:  # a weight holds it whole, so it need not pass through factors of limited rank
        for path, delta in deltas.exact(job):
            yield _changed(path, Effect(workspace.slot(path).layer, (delta.shape[0], delta.shape[1])), delta, dtype)
        yield from _merged_heads(workspace, job, dtype)
        return
    tree = normalize(without_merges(workspace, tree))
    member = Member.of(tree, workspace)
    for adapter in member.adapters:
        if not adapter.averages_in_weight:
            raise KindError(
                f"{adapter.kind} adapter {adapter.name!r} is no change of weights, so it cannot be folded into them"
            )
    for path in dict.fromkeys(p for a in member.adapters for p in a.module_paths):
        if linear_shape(workspace.slot(path).layer) is not None:
            yield from _site(path, effect_of(workspace, path, tree), dtype)
        elif (node := site_program(workspace, path, (tree,))) is not None:
            yield from _parameters(path, workspace.slot(path).layer, _moved(node), dtype)
    yield from _heads(workspace, member, dtype)


def _site(path: str, effect: Effect, dtype: torch.dtype | None) -> Iterator[Folded]:
    if effect.width and (effect.node is not None or effect.gain is not None or effect.rank):
        yield _changed(path, effect, effect.dense(), dtype)
    if effect.bias is not None:
        bias = bias_of(effect.layer)
        if bias is None:
            raise _no_room(path)
        yield _written(f"{path}.bias", bias.detach().float(), effect.bias, dtype or compute_dtype(effect.layer))


def _parameters(path: str, module: nn.Module, deltas: dict[str, Tensor], dtype: torch.dtype | None) -> Iterator[Folded]:
    """Parameters of a norm or an embedding."""
    for name, delta in deltas.items():
        parameter = getattr(module, name, None)
        if parameter is None:
            raise _no_room(path)
        yield _written(f"{path}.{name}", parameter.detach().float(), delta, dtype or parameter.dtype)


def _moved(node: Node) -> dict[str, Tensor]:
    """Deltas of a module's own parameters that a node makes: its output is affine in them, so they add up."""
    terms: list[tuple[Coefficient, Mapping[str, Tensor]]]
    if isinstance(node, Stage):
        terms = [(e.coefficient, {"bias": cast("Tensor", e.atoms.bias)}) for e in node.biases]
        terms += [(e.coefficient, cast("Moved", e.atoms.function).deltas()) for e in node.functions]
    elif isinstance(node, Mix):
        terms = [(c, _moved(inner)) for c, inner in node.terms]
    else:
        terms = [(1.0, _moved(inner)) for inner in cast("Chain", node).parts]
    total: dict[str, Tensor] = {}
    for c, moved in terms:
        for name, delta in moved.items():
            total[name] = c * delta.detach().float() + total.get(name, 0.0)
    return total


def _no_room(path: str) -> KindError:
    return KindError(
        f"the composition moves the bias of {path}, and this base has none there",
        hint="keep the bias adapter as it is, or leave it out: its part has no place in the base's files",
    )


def _changed(path: str, effect: Effect, delta: Tensor, dtype: torch.dtype | None) -> Folded:
    folded = _written(f"{path}.weight", effect.weight(), delta, dtype or compute_dtype(effect.layer))
    if isinstance(effect.layer, Conv1D):  # which keeps its weight as (d_in, d_out)
        return Folded(folded.name, folded.value.T.contiguous(), folded.rounding)
    return folded


def _written(name: str, before: Tensor, delta: Tensor, dtype: torch.dtype) -> Folded:
    exact = before + delta
    value = exact.to(dtype)
    size = float(torch.linalg.vector_norm(delta))
    return Folded(name, value, float(torch.linalg.vector_norm(value.float() - exact)) / size if size else 0.0)


def _heads(workspace: Workspace, member: Member, dtype: torch.dtype | None) -> Iterator[Folded]:
    """Modules carried whole: M_0 + sum_t c_t (M_t - M_0)."""
    base = _base_heads(workspace, member.adapters)
    job = Job(workspace, (member,), get_method("cat"), bind(Call("cat", [member.expr])), "folded", str(member.expr))
    yield from _written_heads(base, merge_heads(job, base), dtype)


def _merged_heads(workspace: Workspace, job: Job, dtype: torch.dtype | None) -> Iterator[Folded]:
    base = _base_heads(workspace, job.adapters)
    yield from _written_heads(base, merge_heads(job, base), dtype)


def _base_heads(workspace: Workspace, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    paths = dict.fromkeys(path for a in adapters for path in a.saved)
    return {
        f"{PREFIX}{path}.{key}": value
        for path in paths
        for key, value in workspace.slot(path).layer.state_dict().items()
    }


def _written_heads(base: dict[str, Tensor], merged: dict[str, Tensor], dtype: torch.dtype | None) -> Iterator[Folded]:
    for key, value in merged.items():
        before = base[key].float()
        yield _written(key.removeprefix(PREFIX), before, value - before, dtype or base[key].dtype)


@torch.no_grad()
def put(model: PreTrainedModel, folded: Sequence[Folded]) -> str:
    """Put new values into the model; the name of the embeddings' twin where the two had to be untied, or nothing."""
    values = {part.name: part.value for part in folded}
    holders: dict[int, list[str]] = {}  # names by the parameter they stand for, each module once
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(f"{path}.{name}")
    untied = ""
    for part in folded:
        parameter = model.get_parameter(part.name)
        for other in holders[id(parameter)]:
            if other in values and torch.equal(values[other], part.value):
                continue
            if not _untie(model, part.name, other):
                raise KindError(
                    f"{part.name} is tied to {other} in this base, which would change with it",
                    hint="adapt both or none of them, or export --format peft",
                )
            untied = untied or (other if other not in values else part.name)
        model.get_parameter(part.name).data.copy_(part.value)
    return untied


def _untie(model: PreTrainedModel, *names: str) -> bool:
    """Give the input and the output embeddings a weight each; False where these names are something else."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if {id(owner) for owner in owners} != {id(end) for end in ends}:
        return False
    for end in ends:
        end.weight = nn.Parameter(end.weight.detach().clone(), requires_grad=False)
    for config in (model.config, text_config(model.config)):
        config.tie_word_embeddings = False
    return True
