"""``hub pull``."""

from __future__ import annotations

from pathlib import Path

import click

from hub.commands._options import jobs_option
from hub.commands._output import json_option, print_json, say, summary


@click.command()
@click.argument("ref")
@click.option(
    "--from",
    "source",
    metavar="REMOTE",
    help="A name (`hub remote`), a URL or a path; without it, the store itself (with --out).",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the artifact as a plain directory, too.")
@click.option("--requires/--no-requires", default=True, help="Pull what it requires as well (the default).")
@jobs_option
@json_option
def pull(ref: str, source: str | None, out: Path | None, requires: bool, jobs: int, as_json: bool) -> None:
    """Bring an artifact from a remote into the store; every byte is checked.

    \b
    hub pull acme/tone --from team
    hub pull 'acme/tone>=1,<2' --from s3://bucket/adapters --out ./tone
    hub pull acme/tone@prod --out ./tone          (from the store)

    An alias in REF is set here too. An interrupted pull goes on where it stopped.
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub
    from hub.console.progress import bars

    store = hub.Store()
    with bars() as progress:
        artifact = hub.pull(ref, from_=source, out=out, requires=requires, jobs=jobs, store=store, progress=progress)
    if as_json:
        print_json({**summary(artifact), "out": None if out is None else str(out)})
    else:
        where = store.where if out is None else str(out)
        say(f"{artifact.ref} ({artifact.digest[:19]}...) is in {where}; every byte is right")
        if signed := len(store.signatures.of(artifact.digest)):
            many = f"{signed} signatures" if signed > 1 else "a signature"
            say(f"{many} came along; `hub verify {artifact.ref} --key KEY.pub.pem` checks it")
