"""How an adapter is learned: the parts of a run that a method may do in its own way, and the registry of methods.

A method is one file under ``train/methods/`` (or any package's ``hub.methods`` entry point)::

    @register("rslora")
    class RsLora(Method):
        kind = "lora"
        defaults = {"use_rslora": True}

A kind for which no method of its name is registered is a method itself: gradient descent on the kind's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

import compose
from compose.kind.adapter import Adapter
from compose.kind.registry import get_kind, kinds
from compose.runtime.model_runtime import runtime
from hub.errors import did_you_mean
from hub.plugins import Registry
from train.config import TrainConfig
from train.errors import ConfigError
from train.steps.objective import forward, loss_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from train.data.batches import Dataset

__all__ = [
    "METHODS",
    "NAME",
    "Composite",
    "Method",
    "MethodOptions",
    "get_method",
    "make_method",
    "methods",
    "register",
    "trained",
    "why_alone",
]

NAME = "trained"  # the adapter's name inside the model while it trains by itself


class MethodOptions(BaseModel):
    """Values of a method itself; the other keys of a run's `options` go to its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Composite(nn.Module):
    """Adapters that are learned together and stored as one composition.

    `expression` joins them by their names here; each is published as an artifact of its own, and the whole as an
    expression over these.
    """

    def __init__(self, members: Mapping[str, Adapter], expression: str) -> None:
        super().__init__()
        self.members: dict[str, Adapter] = dict(members)
        self.expression = expression
        for name, member in members.items():
            self.add_module(name, member)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the members act."""
        return tuple(dict.fromkeys(path for member in self.members.values() for path in member.paths))


class Method:
    """Gradient descent on the kind's own tensors. Other methods override what they do differently."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""  # what is stored: a kind, or such as "prefix >> bottleneck" for a composition
    paper: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}  # the kind's options, where the method's differ from the kind's own
    recipe: ClassVar[Mapping[str, Any]] = {}  # fields of the run's configuration that the method sets unless given
    noise: ClassVar[bool] = True  # whether the model trains with its dropout
    alone: ClassVar[str] = ""  # why its rows cannot share a pass with those of others (train.many); "": they can
    Options: ClassVar[type[MethodOptions]] = MethodOptions

    adapter_name = NAME  # of what trains, inside the model; methods that train on one model at once have one each

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        given = dict(options or {})
        own = {key: given.pop(key) for key in list(given) if key in self.Options.model_fields}
        try:
            self.own = self.Options(**own)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            told = f"{first['msg']} (given {first['input']!r})"
            raise ConfigError(
                f"method {self.name!r}, option {where}: {told}", hint=f"hub methods {self.name}"
            ) from None
        self.kind_options = {**self.defaults, **given}

    # -- the life of a run, in its order ---------------------------------------------------------------------------

    def build(
        self, model: PreTrainedModel, *, seed: int = 0, heads: Sequence[str] = (), tokenizer: Any = None
    ) -> Adapter | Composite:
        """What trains, active in the model.

        `heads` are base modules that the task needs trained and stored whole.
        """
        adapter = self.create(model, self.adapter_name, self.kind, self.kind_options, seed=seed, heads=heads)
        self.prepare(model, adapter, tokenizer)
        compose.activate(model, self.adapter_name)
        return adapter

    def member_name(self, part: str) -> str:
        """What a part of a `Composite` is called in the model: after the part and, of several, after its learner."""
        return part if self.adapter_name == NAME else f"{self.adapter_name}_{part}"

    def prepare(self, model: PreTrainedModel, adapter: Adapter, tokenizer: Any) -> None:
        """Change a fresh adapter: where its tensors start, or what they are made of (train.learner.reparametrize)."""

    def create(
        self,
        model: PreTrainedModel,
        name: str,
        kind: str,
        options: Mapping[str, Any],
        *,
        seed: int = 0,
        heads: Sequence[str] = (),
    ) -> Adapter:
        """A new adapter on the model; an option that neither the method nor the kind has is refused by name."""
        fields = get_kind(kind).Config.model_fields
        for key in options:
            if key not in fields and self.Options.model_fields:
                near = did_you_mean(key, (*self.Options.model_fields, *fields), count=1)
                raise ConfigError(
                    f"method {self.name!r} has no option {key!r}" + (f", did you mean {near[0]!r}?" if near else ""),
                    hint=f"its own: {', '.join(self.Options.model_fields)}; of kind {kind!r}: {', '.join(fields)}",
                )
        values = dict(options)
        if heads:
            values.setdefault("modules_to_save", tuple(heads))
        adapter = compose.create(model, kind, values, name=name, seed=seed)
        named = values.get("target_modules") not in (None, "all-linear", "all")
        reading = None if named else self.reading(model, adapter.paths)
        if reading is None or "target_modules" not in fields:
            return adapter
        compose.detach(model, name)
        return compose.create(model, kind, {**values, "target_modules": reading}, name=name, seed=seed)

    def reading(self, model: PreTrainedModel, paths: Sequence[str]) -> tuple[str, ...] | None:
        """The places of an adapter that a text goes through, where others would idle; None where none would.

        Where all would, the linear layers of the model that reads: biases of images' models beside one without any.
        """
        sites = runtime(model).sites
        kept = tuple(path for path in paths if sites.passes_text(path))
        return None if len(kept) == len(paths) else kept or tuple(s.path for s in sites if sites.reads_text(s.path))

    def warm(self, model: PreTrainedModel, learner: Any, data: Dataset) -> None:
        """Look at the training rows before a fresh run starts: to choose a start, or what is to train."""

    def start(self, learner: Any, optimizer: Optimizer, total_steps: int) -> None:
        """Called before the first step, and again when a run resumes (before the state is read)."""

    def groups(self, learner: Any, config: TrainConfig) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer; weight decay shrinks matrices, not gains, biases or magnitudes.

        A group's `lr_scale` multiplies the run's learning rate.
        """
        trained = [p for p in learner.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
        groups = (
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        )
        return [group for group in groups if group["params"]]

    def inputs(self, batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
        """What goes through the model to train on a batch: its rows, or several for each of them, with labels."""
        return batch

    def logits(self, model: nn.Module, inputs: dict[str, Tensor], task: str) -> Tensor:
        """The model's outputs, in training and in evaluation."""
        return forward(model, inputs, task)

    def objective(self, logits: Tensor, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum of the loss over the batch's items, from the logits of its `inputs`."""
        return loss_sum(task, logits, batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        """Sum of the loss over the batch's items (the loop divides by the items of the whole step).

        One that is put together in another way than from `inputs`, `logits` and `objective` cannot share a pass.
        """
        return self.objective(self.logits(model, self.inputs(batch, task), task), batch, task)

    def after_step(self, learner: Any, step: int) -> None:
        """Called after each optimizer step (proximal steps, masks, rewinding)."""

    def keeps(self, step: int) -> bool:
        """Whether the state after `step` steps is of the form that is stored, so that it may be the best one."""
        return True

    def finish(self, model: PreTrainedModel, learner: Any) -> Adapter | Composite:
        """What is stored: the learner, or what it folds into; active in the model, with the same outputs."""
        stored: Adapter | Composite = learner
        return stored


# -- the registry --------------------------------------------------------------------------------------------------


class _Methods(Registry[type["Method"]]):
    """The files of `train.methods`, the entry points `hub.methods`, and every kind without a method of its name."""

    def all(self) -> Mapping[str, type[Method]]:
        """All methods by name, sorted."""
        own = super().all()
        plain = {name: _plain(kind) for name, kind in kinds().items() if name not in own}
        return MappingProxyType(dict(sorted({**plain, **own}.items())))


METHODS = _Methods("method", package="train.methods", group="hub.methods", error=ConfigError)
_M = TypeVar("_M", bound=type[Method])


def register(name: str) -> Callable[[_M], _M]:
    """Class decorator that makes a method known under `name`."""

    def add(cls: _M) -> _M:
        cls.name = name
        METHODS.add(name, cls)
        return cls

    return add


def _plain(kind: type[Adapter]) -> type[Method]:
    doc = f"Gradient descent on the tensors of kind `{kind.kind}`."
    facts = {"name": kind.kind, "kind": kind.kind, "paper": kind.paper, "__doc__": doc}
    return type(f"Plain_{kind.kind}", (Method,), facts)


def methods() -> Mapping[str, type[Method]]:
    """All methods by name."""
    return METHODS.all()


def get_method(name: str) -> type[Method]:
    """The method called `name`; ConfigError with a suggestion otherwise."""
    return METHODS.get(name)


def why_alone(method: Method) -> str:
    """Why a method cannot train many at once; "" where it can."""
    own = [name for name in ("loss", "logits") if getattr(type(method), name) is not getattr(Method, name)]
    return type(method).alone or (f"it computes its {own[0]} in its own way" if own else "")


def make_method(config: TrainConfig) -> tuple[Method, TrainConfig]:
    """The method of a run, and the run's configuration with the method's recipe for what was not given.

    Raises
    ------
    ConfigError
        An unknown method, or a value that one of its own options cannot take.
    """
    cls = get_method(config.method)
    unset = {key: value for key, value in cls.recipe.items() if key not in config.model_fields_set}
    given = {key: getattr(config, key) for key in config.model_fields_set}
    return cls(config.options), TrainConfig(**{**unset, **given}) if unset else config


def trained(learner: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in learner.parameters() if p.requires_grad)
