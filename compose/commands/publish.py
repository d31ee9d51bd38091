"""``hub compose EXPR -o NS/NAME@VERSION``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compose.commands._options import adapter_option, base_option, expression
from hub.console.output import bytes_text, json_option, print_json, say
from hub.console.progress import steps_bar

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact


@click.command(name="EXPR")
@click.argument("words", nargs=-1, metavar="EXPR")
@click.option("-o", "--out", "ref", metavar="NS/NAME@VERSION", help="Publish under this name.")
@click.option("--merge", "merging", is_flag=True, help="Carry it out in parameter space: one new adapter.")
@click.option("--rank", type=click.IntRange(min=1), help="With --merge: one plain LoRA of this rank, of any kinds.")
@click.option(
    "--data", "texts", multiple=True, metavar="[NAME=]FILE", help="With --merge: what regmean, fisher, ... measure on."
)
@base_option
@adapter_option
@click.option("--allow-base-drift", is_flag=True, help="Accept adapters of other weights of one architecture.")
@click.option("--license", "license_", metavar="SPDX", help="Licence [that of the members, if it is one].")
@click.option("--summary", default="", help="One sentence for its card.")
@json_option
def publish(
    words: tuple[str, ...],
    ref: str | None,
    merging: bool,
    rank: int | None,
    texts: tuple[str, ...],
    base: str | None,
    adapters: tuple[str, ...],
    license_: str | None,
    as_json: bool,
    **facts: Any,
) -> None:
    """Publish a composition into the store, or with --merge the one adapter it makes.

    \b
    hub compose '0.5 * acme/tone + acme/law' -o acme/both@1.0.0
    hub compose 'average(acme/tone, acme/law)' --merge -o acme/mean@1.0.0
    hub compose 'acme/dora >> acme/ia3' --merge --rank 16 -o acme/plain@1.0.0
    hub compose 'regmean(acme/tone, acme/law)' --merge --data texts.jsonl -o acme/near@1.0.0

    A composition requires its members, each by range and digest: it goes on meaning what it means now, whatever is
    published later. With --base it is tried on the shapes of that base first; --merge always does that. Some merges
    measure their adapters on texts: --data FILE, or for each argument of the merge its own, --data acme/tone=FILE.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from compose import verbs
    from compose.planning.members import assignments
    from hub.errors import UsageError

    text = expression(_one(words, ref))
    if rank is not None and not merging:
        raise UsageError("--rank is the rank of a merged adapter", hint="add --merge")
    if texts and not merging:
        raise UsageError("--data is what a merge measures its adapters on", hint="add --merge")
    options = {"adapters": assignments(adapters), "base": base, "license": license_, **facts}
    if not merging:
        _tell(verbs.publish(text, str(ref), **options), as_json)
        return
    one = len(texts) == 1 and Path(texts[0]).is_file()
    data = Path(texts[0]) if one else assignments(texts, "--data", "FILE") or None
    with steps_bar() as progress:
        artifact, merged = verbs.publish_merge(text, str(ref), rank=rank, data=data, progress=progress, **options)
    certificate = merged.certificate
    _tell(artifact, as_json, certificate=certificate.as_dict())
    if not as_json:
        say(f"certificate: {certificate}")


def _one(words: tuple[str, ...], ref: str | None) -> str:
    from compose.commands import VERBS
    from hub.errors import UsageError, suggest

    if not words:
        raise UsageError("which expression?", hint="hub compose 'a + b' -o ns/name@1.0.0")
    near = suggest(words[0], VERBS)
    if len(words) > 1:
        hint = near or f"put the expression in quotes: hub compose '{' '.join(words)}'"
        raise UsageError(f"an expression is one argument, not {len(words)}", hint=hint)
    if ref is None:
        hint = near or "-o NS/NAME@VERSION publishes it; `hub compose explain EXPR` tells what it does"
        raise UsageError(f"what is to be done with {words[0]!r}?", hint=hint)
    return words[0]


def _tell(artifact: Artifact, as_json: bool, **more: Any) -> None:
    manifest = artifact.manifest
    if as_json:
        facts = {
            "ref": str(artifact.ref),
            "digest": artifact.digest,
            "type": manifest.type,
            "kind": manifest.kind,
            "expression": manifest.expression,
            "base": manifest.base.repo if manifest.base else None,
            "requires": [need.as_dict() for need in manifest.requires],
            "parents": list(manifest.lineage.parents) if manifest.lineage else [],
            "size": manifest.size,
        }
        print_json({**facts, **more})
        return
    click.echo(str(artifact.ref))
    what = manifest.expression if manifest.type == "composition" else f"{manifest.kind}, {bytes_text(manifest.size)}"
    say(f"  {artifact.digest[:19]}..., {what}")
    for need in manifest.requires:
        say(f"  requires {need.name}{need.range or ''} ({(need.digest or '')[:19]}...)")
