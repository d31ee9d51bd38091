"""``hub verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.commands._output import json_option, print_json, say

if TYPE_CHECKING:
    from hub.store import Problem, Store

_RUN = "compose.artifacts.probes:check"


@click.command()
@click.argument("target", metavar="[REF|DIR]", required=False)
@click.option("--run", is_flag=True, help="Run its probes too: does it do here what it did at its author's?")
@click.option("--base", metavar="BASE", help="With --run: on this base [the one it was made for].")
@click.option(
    "--quantize",
    type=click.Choice(["none", "int8", "nf4"]),
    help="With --run: how the base is held [as its author held it].",
)
@click.option("--allow-base-drift", is_flag=True, help="With --run: on other weights of the same architecture, too.")
@click.option("--key", type=click.Path(path_type=Path), help="Check its signature against this public key (PEM).")
@click.option("--signature", type=click.Path(path_type=Path), help="Where the signature is [where `hub sign` put it].")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    target: str | None,
    run: bool,
    key: Path | None,
    signature: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Read every byte and say what is damaged; exit 1 if anything is.

    \b
    hub verify                                     (the whole store: blobs, log, index)
    hub verify acme/tone                           (one artifact)
    hub verify ./tone                              (a directory against its module.json)
    hub verify acme/tone --run --base ./my-base    (and what it does on that base)
    hub verify acme/tone --key author.pub.pem      (and who has signed it)
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from hub.errors import UsageError
    from hub.store import Store

    if target is None and (run or key):
        raise UsageError("--run and --key are about one artifact", hint="write hub verify REF ...")
    if not run and (given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]):
        raise UsageError(f"{given[0]} needs --run")
    if signature is not None and key is None:
        raise UsageError("--signature needs --key")
    store = Store()
    problems = _bytes(store, target)
    report: dict[str, Any] = {"checked": target or store.where}
    if not problems and key is not None:
        from hub.signing import check

        report["signed"] = check(store, str(target), key, signature).as_dict()
    if not problems and run:
        report["run"] = _run(store, str(target), problems, options)
    _tell(report, problems, as_json)
    if problems:
        ctx.exit(1)


def _bytes(store: Store, target: str | None) -> list[Problem]:
    if target is None or not Path(target).is_dir():
        return store.verify(target)
    from hub.errors import HubError
    from hub.pack import check_directory
    from hub.store import Problem

    try:
        check_directory(Path(target))
    except HubError as error:
        return [Problem(target, error.message)]
    return []


def _run(store: Store, ref: str, problems: list[Problem], options: dict[str, Any]) -> dict[str, Any]:
    from hub.errors import UsageError
    from hub.lazy import load
    from hub.store import Problem

    if Path(ref).is_dir():
        raise UsageError(f"{ref} is a directory; --run needs an artifact of the store", hint=f"hub push {ref} first")
    outcome = load(_RUN)(ref, store=store, **options)
    if outcome.same:
        say(f"{outcome.ref} {outcome}")
    else:
        problems.append(Problem(outcome.ref, str(outcome)))
    found: dict[str, Any] = outcome.as_dict()
    return found


def _tell(report: dict[str, Any], problems: list[Problem], as_json: bool) -> None:
    if as_json:
        found = [{"about": problem.about, "message": problem.message} for problem in problems]
        print_json({**report, "ok": not problems, "problems": found})
        return
    if "signed" in report and not problems:
        say(f"{report['checked']}: signed by {report['signed']['key']}")
    if not problems:
        say(f"{report['checked']}: every byte is right")
        return
    for problem in problems:
        click.echo(str(problem))
    if "run" in report:
        say("its bytes are right; compare the base (hub show) and how it is held (--quantize)")
    else:
        say(f"{len(problems)} problem{'s' * (len(problems) > 1)}; pull or push the artifact again to mend it")
