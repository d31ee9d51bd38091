"""One plain LoRA by vLLM's rules: factors A and B alone, no DoRA, no biases, no whole modules, r <= 512."""

from __future__ import annotations

from pathlib import Path

from torch.nn.functional import pad
from transformers import PreTrainedModel

from compose.artifacts.export_format import FORMATS, ExportFormat, Written
from compose.base.model import name_of
from compose.errors import KindError
from compose.formats.directory import export_peft
from compose.formats.files import read_config, read_tensors, write_config, write_tensors
from compose.kind.low_rank import LowRankConfig
from compose.kind.tensors import PREFIX
from compose.merging.merge import lower_to_lora
from compose.parameter_space.execute import Merged
from compose.runtime.model_runtime import runtime
from hub.contents.checks import CONFIG, EXTRA, WEIGHTS
from hub.contents.tensor_files import read_header
from hub.errors import GateError

_A, _B = ".lora_A.weight", ".lora_B.weight"
# Ranks that vLLM reserves room for (--max-lora-rank).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@FORMATS.register("vllm")
class VLLM(ExportFormat):
    """A LoRA as it is; anything else that changes weights as the LoRA of ``rank`` that is nearest to it."""

    options = frozenset({"rank", "base_name"})

    def write(self, out: Path) -> Written:
        """Copy or approximate it, and compare what was written with what vLLM reads."""
        artifact, notes, measured = self.artifact, list[str](), dict[str, float]()
        manifest = artifact.manifest
        if manifest.task not in (None, "causal_lm"):
            raise KindError(
                f"{artifact.ref} is for {manifest.task}, and vLLM serves adapters of causal language models"
            )
        fields = read_config(artifact.file(CONFIG)) if manifest.type in ("adapter", "merge") else {}
        if manifest.kind == "lora" and "peft_type" in fields:
            if EXTRA in artifact.files:
                raise KindError(
                    f"{artifact.ref} carries whole modules (modules_to_save), which vLLM refuses",
                    hint="--format merged makes a model of it that vLLM serves",
                )
            self.copy_adapter(fields, out)
        else:
            lowered = write_lowered(self.load(), out, what=str(artifact.ref), rank=self.rank, base_name=self.base_name)
            measured["discarded"] = lowered.certificate.share
            notes.append(f"written as one LoRA: {lowered.certificate}")
        rank, changed = fit(out)
        if changed:
            notes.append("ranks and scales differ by module: the scales went into B, the ranks were filled with zeros")
        room = next(most for most in VLLM_RANKS if rank <= most)
        notes.append(f"serve it with: vllm serve BASE --enable-lora --max-lora-rank {room} --lora-modules NAME=DIR")
        return notes, measured


def write_lowered(
    model: PreTrainedModel, out: Path, *, what: str, rank: int | None, base_name: str | None = None
) -> Merged:
    """Write what is active on a model, for its one row, as a plain LoRA in PEFT's form.

    Raises
    ------
    KindError
        ``what`` carries whole modules, or changes no weights, or has no finite rank and none is given.
    """
    home = runtime(model)
    lowered = lower_to_lora(model, home.rows[0], rank=rank)
    if lowered.adapter.saved:
        raise KindError(f"{what} carries whole modules, which vLLM refuses", hint="use --format merged")
    named = base_name or name_of(model)
    export_peft(lowered.adapter, out, sites=home.sites, model=model, base=named, task="causal_lm")
    return lowered


def fit(directory: Path) -> tuple[int, bool]:
    """Bring a PEFT directory of a LoRA to vLLM's rules and check them; returns its rank and whether numbers moved."""
    changed = _uniform(directory)
    return _check_vllm(directory), changed


def _uniform(directory: Path) -> bool:
    """Give every pair one rank and one scale, for an engine that knows no patterns; whether anything had to change.

    `s_p B_p A_p = 1 [s_p B_p, 0] [A_p; 0]` with the largest rank everywhere and `alpha = r`, so the scale is 1.
    """
    fields = read_config(directory / CONFIG)
    given = fields.get("rank_pattern"), fields.get("alpha_pattern")
    if not any(given):
        return False
    tensors = read_tensors(directory)
    ranks, alphas = (tuple((pattern or {}).items()) for pattern in given)
    config = LowRankConfig(
        r=fields["r"],
        lora_alpha=fields["lora_alpha"],
        use_rslora=bool(fields.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    most = max(len(value) for key, value in tensors.items() if key.endswith(_A))
    for key in [key for key in tensors if key.endswith(_A)]:
        path, b = key.removeprefix(PREFIX).removesuffix(_A), key.removesuffix(_A) + _B
        room = most - len(tensors[key])
        tensors[key] = pad(tensors[key], (0, 0, 0, room))
        tensors[b] = pad(tensors[b].float() * config.scale_at(path), (0, room))
    write_tensors(directory / WEIGHTS, tensors)
    plain = {"r": most, "lora_alpha": most, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_config(directory / CONFIG, {**fields, **plain})
    return True


def _check_vllm(directory: Path) -> int:
    """Compare a directory with what vLLM reads; returns the rank."""
    fields = read_config(directory / CONFIG)
    shapes = {info.name: info.shape for info in read_header(directory / WEIGHTS).tensors}
    names = list(shapes)
    odd = [name for name in names if not name.endswith((_A, _B))]
    if odd or not all(name.startswith(PREFIX) for name in names):
        raise GateError(f"vLLM has no place for {(odd or names)[0]}", path=directory)
    if fields.get("use_dora") or fields.get("bias") not in (None, "none") or fields.get("modules_to_save"):
        raise GateError("vLLM takes neither DoRA, nor biases, nor modules_to_save", path=directory)
    if not isinstance(fields.get("target_modules"), list):
        raise GateError("vLLM wants target_modules as a list", path=directory)
    rank = int(fields["r"])
    other = [name for name, shape in shapes.items() if shape[0 if name.endswith(_A) else 1] != rank]
    if other:
        raise GateError(f"vLLM would scale {other[0]} of shape {list(shapes[other[0]])} by r = {rank}", path=directory)
    if rank > VLLM_RANKS[-1]:
        raise KindError(
            f"the rank is {rank}, and vLLM takes at most {VLLM_RANKS[-1]}",
            hint=f"hub compose REF --merge --rank {VLLM_RANKS[-1]} -o NS/NAME@VERSION, then export that",
        )
    return rank
