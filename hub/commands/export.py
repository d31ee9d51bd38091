"""``hub export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hub.commands._output import json_option, print_json, say
from hub.console.options import quantize_option
from hub.lazy import load

_FORMATS = click.Choice(load("compose.artifacts.export_format:FORMATS").names())


@click.command()
@click.argument("ref")
@click.option("--format", "format_", type=_FORMATS, required=True, help="For whom.")
@click.option("--to", "out", type=click.Path(path_type=Path), help="The directory [./NAME-FORMAT].")
@click.option("--base", metavar="BASE", help="The base [the one it was made for].")
@click.option("--rank", type=click.IntRange(min=1), help="vllm: rank of the LoRA that stands for another kind.")
@quantize_option("merged: fold into weights so rounded [as it was trained].")
@click.option("--base-name", metavar="NAME", help="peft, vllm: what the config calls the base.")
@click.option("--allow-base-drift", is_flag=True, help="Accept other weights of the same architecture.")
@json_option
def export(ref: str, format_: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Write an artifact for another engine.

    \b
    hub export acme/tone --format peft --to ./tone       PeftModel.from_pretrained("./tone")
    hub export acme/both --format vllm                   one plain LoRA, by vLLM's rules
    hub export acme/dora --format vllm --rank 16         what no LoRA is exactly, approximated and measured
    hub export acme/tone --format merged --to ./model    the base with it folded in, and what rounding has lost
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub
    from hub.ref import AdapterRef

    place = out or Path(f"{AdapterRef.parse(ref).name}-{format_}")
    done = hub.export(ref, format_, place, **options)
    if as_json:
        print_json(done.as_dict())
        return
    for note in done.notes:
        say(note)
    say(f"{done.ref} is in {done.directory}")
