"""An adapter on parts of fused linears as one on the whole linears, for engines that do not know parts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compose.errors import KindError
from compose.expr.tree import Ref
from compose.kind.adapter import Adapter
from compose.kind.registry import make_config
from compose.merging.merge import merge
from compose.parameter_space.effect import entries
from compose.parameter_space.execute import Merged, Workspace
from compose.runtime.model_runtime import runtime
from compose.slots.lowering import site_program


@torch.no_grad()
def widen(model: PreTrainedModel, adapter: Adapter) -> Merged:
    """The same adapter with q, k, v, ... as rows of whole layers; a low-rank one needs the sum of the parts' ranks.

    Of a LoRA or DoRA, the other rows of B are zero; of an (IA)^3 the other gains are one. The certificate tells what
    is lost where that rank is above a layer's dimensions, which is nothing.

    Parameters
    ----------
    adapter
        Resident in the model.

    Raises
    ------
    KindError
        A kind that cannot leave rows alone, by name.
    """
    if adapter.peft_type == "LORA":
        return merge(model, Ref(adapter.name), name=adapter.name)
    if adapter.peft_type != "IA3":
        part = next(path for path in adapter.paths if path not in adapter.module_paths)
        raise KindError(
            f"{adapter.kind} adapter {adapter.name!r} acts on {part}, a part of a fused layer, and on a whole layer a "
            f"{adapter.kind} cannot leave the other rows alone",
            hint="--format merged folds it into the base",
        )
    return Merged(_gains(model, adapter))


def _gains(model: PreTrainedModel, adapter: Adapter) -> Adapter:
    workspace = Workspace(runtime(model))
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for path in adapter.module_paths:
        node = site_program(workspace, path, (Ref(adapter.name),))
        for atoms in [] if node is None else [e.atoms for e in entries(node)]:
            if atoms.input_gain is not None:
                inputs[path] = atoms.input_gain
            elif atoms.gain is not None:
                outputs[path] = outputs[path] + atoms.gain - 1 if path in outputs else atoms.gain
    cls = type(adapter)
    options = {
        "target_modules": (*outputs, *inputs),
        "feedforward_modules": tuple(inputs),
        "modules_to_save": adapter.config.modules_to_save,
    }
    whole = cls(make_config(cls, options), workspace.sites, model, name=adapter.name)
    vectors = {whole.key(path, "out"): gain[:, None] for path, gain in outputs.items()}
    vectors |= {whole.key(path, "in"): gain[None] for path, gain in inputs.items()}
    whole.load_state({**vectors, **adapter.head_state()})
    return whole.freeze()
