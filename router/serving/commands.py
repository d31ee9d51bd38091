"""`hub serve`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from hub.console.options import quantize_option

if TYPE_CHECKING:
    from threading import Event

    from fastapi import FastAPI


@click.command()
@click.argument("base")
@click.option(
    "--adapter", "adapters", metavar="NAME=REF|DIR", multiple=True, help="An adapter under a name of its own."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="Port; 0: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--token", envvar="HUB_SERVE_TOKEN", help="Clients must send it as a bearer token.  [env: HUB_SERVE_TOKEN]"
)
@quantize_option()
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows computed together.")
@click.option("--waiting", type=click.IntRange(1), default=1024, show_default=True, help="Rows that may wait.")
@click.option("--resident", metavar="SIZE", default="4GiB", show_default=True, help="Adapters kept in memory.")
@click.option("--chat-template", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A Jinja template.")
@click.option("--served-model-name", "names", metavar="NAME", multiple=True, help="Another name of BASE.")
@click.option("--cors", "origins", metavar="ORIGIN", multiple=True, help="Web pages that may ask; * for any.")
@click.option("--tool-format", metavar="NAME", help="How BASE writes calls of tools; else its chat template shows it.")
@click.option("--allow-directories", is_flag=True, help="Let clients load adapters from directories of this machine.")
@click.option("--allow-base-drift", is_flag=True, help="Take adapters of other weights of the same architecture.")
@click.option(
    "--grace", type=click.FloatRange(0), default=20.0, show_default=True, help="Seconds to end rows in at SIGTERM."
)
@click.option("--access-log", is_flag=True, help="Log every request to stderr.")
def serve(base: str, host: str, port: int, token: str | None, grace: float, access_log: bool, **given: Any) -> None:
    """Serve BASE and its adapters: the OpenAI API, one batch for requests of any adapters.

    `model` in a request names an adapter of the store (ns/name@1.2.0), one given here, an expression
    ("0.5 * legal + tone"), a router, or BASE; BASE:ADAPTER is understood too. The address is printed to stdout once
    the server answers. At SIGTERM it takes no more requests (503, and /ready says so), and rows under way have --grace
    seconds to end; a second signal ends them at once.

    \b
    hub serve builtin:tiny-lm --port 8001
    curl localhost:8001/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "local/legal", "prompt": "The parties agree"}'
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    from hub.errors import UsageError
    from hub.io.listen import is_loopback, listen, require_extra

    if token is None and not is_loopback(host):
        raise UsageError(f"without a token the server serves this machine only, not {host}", hint="--token TEXT")
    require_extra()
    app = _app(base, token, given)
    listen(app, host, port, access_log=access_log, announce=click.echo, drain=partial(_drain, app, grace))


def _drain(app: FastAPI, grace: float, hurry: Event) -> None:
    """Let rows under way end within the time given; whose have not are told."""
    scheduler, until = app.state.engine.scheduler, monotonic() + grace
    scheduler.drain(0)
    while any(scheduler.counts) and monotonic() < until and not hurry.wait(0.05):
        pass
    scheduler.stop()


def _app(base: str, token: str | None, given: dict[str, Any]) -> FastAPI:
    import torch

    from compose.planning.held import held_as, manifests_of
    from compose.planning.members import AdapterFinder
    from hub.console.sizes import parse_size
    from router.engine.engine import Engine
    from router.serving.app import create_app

    named = dict(_named(text) for text in given["adapters"])
    on_cpu = not torch.cuda.is_available()
    engine = Engine(
        base,
        adapters=named,
        quantize=held_as(given["quantize"], manifests_of(named, AdapterFinder(given=named))),
        dtype=("fp32" if on_cpu else None) if given["dtype"] == "auto" else given["dtype"],
        rows=given["batch_size"],
        resident=parse_size(given["resident"]),
        allow_base_drift=given["allow_base_drift"],
    )
    for name in engine.sources.given:
        engine.targets.get(name)  # a wrong one is an error here, not at the first request
    if given["chat_template"] is not None:
        engine.host.tokenizer.chat_template = given["chat_template"].read_text(encoding="utf-8")
    engine.targets.bases.add(base)  # as it was written here, which may be a path
    return create_app(
        engine,
        token=token,
        directories=given["allow_directories"],
        waiting=given["waiting"],
        names=given["names"],
        origins=given["origins"],
        tool_format=given["tool_format"],
    )


def _named(text: str) -> tuple[str, str]:
    from hub.errors import UsageError

    name, sign, source = text.partition("=")
    if not (name and sign and source):
        raise UsageError(f"{text!r} is not NAME=REF or NAME=DIRECTORY", hint="--adapter tone=acme/tone@1.2.0")
    return name, source
