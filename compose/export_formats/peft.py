"""A PEFT directory: what ``PeftModel.from_pretrained`` reads."""

from __future__ import annotations

from pathlib import Path

from compose.api import attach
from compose.artifacts.export_format import FORMATS, ExportFormat, Written
from compose.base.model import name_of
from compose.errors import KindError
from compose.formats import peft as peft_layout
from compose.formats.directory import export_peft
from compose.formats.files import read_config
from compose.kind.heads import own_vocabulary
from compose.kind.registry import get_kind
from compose.merging.whole_layers import widen
from compose.runtime.model_runtime import runtime
from hub.contents.checks import CONFIG, EXTRA

_PLAIN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # PEFT adds no head of its own to these


@FORMATS.register("peft")
class Peft(ExportFormat):
    """One adapter as PEFT stores it; the base is loaded only where PEFT wants its head, or whole layers."""

    options = frozenset({"base_name"})

    def write(self, out: Path) -> Written:
        """Copy the artifact's files where they are PEFT's, else write them anew."""
        artifact = self.one_adapter("PEFT")
        fields = read_config(artifact.file(CONFIG))
        peft_type = get_kind(artifact.manifest.kind).peft_type
        if peft_type is None:
            raise KindError(
                f"{artifact.ref} is a {artifact.manifest.kind}, which PEFT does not have",
                hint="--format merged folds it into the base, where it is a change of weights",
            )
        plain = _PLAIN_TASKS if peft_type in peft_layout.PROMPT_LEARNING else (*_PLAIN_TASKS, None)
        on_parts = "peft_type" not in fields
        if not on_parts and EXTRA not in artifact.files and fields.get("task_type") in plain:
            self.copy_adapter(fields, out)
            return (), {}
        model = self.load()
        adapter, notes = attach(model, str(artifact.ref), artifact, allow_base_drift=True), list[str]()
        if on_parts:
            wide = widen(model, adapter)
            adapter = wide.adapter
            notes.append(f"its parts of fused layers are written as whole layers: {wide.certificate}")
        sites, named = runtime(model).sites, self.base_name or name_of(model)
        if (tokens := own_vocabulary(adapter, sites, model)) is not None:
            notes.append(
                f"it has a vocabulary of its own, of {tokens} tokens, and PEFT reads it on a base with as many: "
                f"model.resize_token_embeddings({tokens}) before PeftModel.from_pretrained"
            )
        export_peft(adapter, out, sites=sites, model=model, base=named, task=artifact.manifest.task)
        return notes, {}
