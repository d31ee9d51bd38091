"""`hub eval`."""

from __future__ import annotations

import os

import click

from hub.console.options import quantize_option
from hub.console.output import json_file_option, write_json

__all__ = ["eval_"]


@click.command("eval")
@click.argument("expression")
@click.argument("data")
@click.option("--base", metavar="BASE", help="The base [the one the adapters were made for].")
@click.option("--task", help="causal_lm, seq2seq, classification, ... [what the adapters were trained for].")
@quantize_option()
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--max-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens a row.")
@click.option("--batch", "batch_size", type=click.IntRange(1), default=32, show_default=True, help="Rows a pass.")
@click.option("--column", "columns", multiple=True, metavar="ROLE=NAME", help="The file's name for text, label, ...")
@json_file_option
def eval_(
    expression: str,
    data: str,
    base: str | None,
    task: str | None,
    quantize: str,
    precision: str,
    max_length: int,
    batch_size: int,
    columns: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Measure an adapter, or an expression over adapters, on DATA: loss, accuracy, F1, perplexity, ...

    \b
    hub eval local/reviews test.jsonl
    hub eval 'ties(acme/law@1.0.0, acme/mail@1.0.0)' mail.jsonl --json -
    hub eval none notes.txt --base builtin:tiny-lm --task causal_lm      (the bare base)
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported: see `hub train`
    from train import evaluate
    from train.config import parse_pairs

    facts = evaluate(
        None if expression == "none" else expression,
        data,
        base=base,
        task=task,
        quantize=quantize,
        precision=precision,
        max_length=max_length,
        batch_size=batch_size,
        columns=parse_pairs(columns),
    )
    write_json(facts, json_path)
    if json_path == "-":
        return
    width = max(len(name) for name in facts["measures"])
    click.echo(f"{facts['expression'] or 'the bare base'} on {facts['data']} ({facts['task']}, {facts['base']})")
    for name, value in facts["measures"].items():
        click.echo(f"  {name.ljust(width)}  {value:.6g}")
