"""``hub route fit`` and ``hub route add``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.console.output import json_option, print_json, say
from router.commands._options import Told, bar, base_options, load_with_members, text_options

if TYPE_CHECKING:
    from hub.storage.artifact import Artifact


def _shared(function: Any) -> Any:
    data = click.option(
        "--data", "data", multiple=True, metavar="NAME=FILE", help="Texts a member was made for: JSONL or plain text."
    )
    out = click.option("-o", "--out", "ref", required=True, metavar="NS/NAME@VERSION", help="Publish under this name.")
    return out(data(function))


@click.command()
@click.argument("members", nargs=-1, required=True, metavar="MEMBERS...")
@click.option("--method", required=True, help="How experts are scored; `hub route methods` lists them.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Option of the method (repeat).")
@_shared
@click.option("--top-k", type=int, help="Experts kept for a row or token [the method's own].")
@click.option("--threshold", type=float, help="Weights under it become 0 [0].")
@click.option("--temperature", type=float, help="Divides the scores [the method's own].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is learned.")
@text_options
@base_options
@click.option("--license", "license_", metavar="SPDX", help="Licence of the router.")
@click.option("--summary", default="", help="One sentence for its card.")
@json_option
def fit(members: tuple[str, ...], ref: str, as_json: bool, **given: Any) -> None:
    """Make a router of adapters, fitted on their texts where the method needs some, and publish it.

    \b
    hub route fit acme/law acme/code --method arrow -o acme/router@1.0.0
    hub route fit acme/law acme/code --method discriminant --data law=l.jsonl --data code=c.jsonl -o acme/near@1.0.0
    hub route fit a=acme/law 'b=acme/code>=1,<2' --method phatgoose --option steps=200 --data a=... -o acme/p@1.0.0

    A member is called by the last part of its ref, or by NAME=REF.
    """  # noqa: D301
    from compose.planning.members import Shelf
    from router.artifact import members_of
    from router.scorer import make_scorer

    shelf = Shelf()
    scorer = make_scorer(given["method"], _options(given["options"]))  # what is wrong here is told before any work
    found = members_of(members, shelf)
    gating = _gating(scorer.gating, len(found), given)
    with bar() as told:
        artifact = _fit(found, scorer, gating, ref, shelf, given, told)
    _tell(artifact, as_json)


def _fit(
    found: Any, scorer: Any, gating: Any, ref: str, shelf: Any, given: dict[str, Any], told: Told | None
) -> Artifact:
    from compose.expr.tree import Ref
    from hub.relations.word_counts import count_words
    from router.artifact import publish
    from router.bench import refuse_missing
    from router.router import Router

    texts = _texts(given["data"], found, given["max_rows"])
    if scorer.needs_data:
        refuse_missing(found, texts)
    names = {name: Ref(name) for name in found}
    model, tokenizer = load_with_members({name: held.where for name, held in found.items()}, given)
    bench = _bench(model, tokenizer, names, texts, given, told)
    router = Router(scorer, names, scorer.fit(bench), gating)
    words = {name: count_words(rows) for name, rows in texts.items()}
    return publish(router, found, ref, shelf, words=words, license=given["license_"], summary=given["summary"])


@click.command()
@click.argument("router", metavar="ROUTER")
@click.argument("adapter", metavar="ADAPTER")
@_shared
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is learned.")
@text_options
@base_options
@json_option
def add(router: str, adapter: str, ref: str, as_json: bool, **given: Any) -> None:
    """Publish a router with one more adapter: only the new one is measured, the others stay as they are.

    \b
    hub route add acme/router acme/mail -o acme/router@1.1.0
    hub route add acme/near mail=acme/mail --data mail=mail.jsonl -o acme/near@1.1.0
    """  # noqa: D301
    from compose.expr.tree import Ref
    from compose.planning.members import Shelf
    from hub.errors import Conflict
    from hub.relations.word_counts import count_words, read_words
    from router.artifact import load, members_of, publish

    shelf = Shelf()
    stored = load(router, shelf.store)
    old = [f"{name}={a.ref.id}@{a.digest}" for name, a in stored.artifacts.items()]
    (name, new) = next(iter(members_of([adapter], shelf).items()))
    if name in stored.artifacts:
        raise Conflict(f"{router} has a member {name!r} already", hint=f"give it another name: other={adapter}")
    found = members_of([*old, f"{name}={new.text}"], shelf)
    texts = _texts(given["data"], {name: new}, given["max_rows"])
    with bar() as told:
        model, tokenizer = load_with_members({name: new.where}, given)
        bench = _bench(model, tokenizer, {name: Ref(name)}, texts, given, told)
        grown = stored.router.add(name, bench)
    words = read_words(shelf.store.get(router))
    known = {n: words[str(held.digest)] for n, held in found.items() if str(held.digest) in words}
    counted = {n: count_words(rows) for n, rows in texts.items()}
    kept = stored.manifest.requires if stored.manifest is not None else ()
    _tell(publish(grown, found, ref, shelf, words={**known, **counted}, kept=kept), as_json)


def _bench(model: Any, tokenizer: Any, names: Any, texts: Any, given: dict[str, Any], told: Told | None) -> Any:
    from router.bench import Bench
    from router.evaluation.texts import encode

    rows = {name: encode(tokenizer, found, most=given["max_length"]) for name, found in texts.items()}
    return Bench(model, names, rows, pad=tokenizer.pad_token_id or 0, seed=given["seed"], told=told)


def _texts(pairs: tuple[str, ...], members: Any, most: int) -> dict[str, list[str]]:
    """Texts by member; a name that is no member is an error."""
    from hub.errors import NotFound, suggest
    from router.evaluation.texts import named_files, read_texts

    files: dict[str, Path] = named_files(pairs)
    for name in files:
        if name not in members:
            hint = suggest(name, members) or "members: " + ", ".join(members)
            raise NotFound(f"--data gives texts for {name!r}, which is no member", hint=hint)
    return {name: [row.text for row in read_texts(file, most=most)] for name, file in files.items()}


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    from hub.errors import UsageError

    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise UsageError(f"{pair!r} sets no option", hint="write --option NAME=VALUE")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[name] = value
    return options


def _gating(own: Any, experts: int, given: dict[str, Any]) -> Any:
    from dataclasses import replace

    from router.router import within

    asked = {key: given[key] for key in ("top_k", "threshold", "temperature") if given[key] is not None}
    return replace(within(own, experts), **asked).check(experts)


def _tell(artifact: Artifact, as_json: bool) -> None:
    manifest = artifact.manifest
    if as_json:
        print_json(
            {
                "ref": str(artifact.ref),
                "digest": artifact.digest,
                "method": manifest.method,
                **manifest.hyperparameters,
                "requires": [need.as_dict() for need in manifest.requires],
                "size": manifest.size,
            }
        )
        return
    click.echo(str(artifact.ref))
    many = "adapter" if len(manifest.requires) == 1 else "adapters"
    say(f"  {artifact.digest[:19]}..., {manifest.method} over {len(manifest.requires)} {many}")
    say(f"  next: hub route eval {artifact.ref} --data NAME=FILE")
