"""``hub registry``: serve a store, and make its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group(invoke_without_command=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--store", type=click.Path(path_type=Path), help="Store to serve; HUB_HOME without it.")
@click.option(
    "--tokens", type=click.Path(path_type=Path, dir_okay=False), help="Tokens file; see `hub registry token`."
)
@click.option(
    "--visibility",
    type=click.Choice(["public", "private"]),
    help="Of repositories about which nobody has said it [private with --tokens, else public].",
)
@click.option(
    "--keep-drafts",
    type=click.FloatRange(0, min_open=True),
    metavar="DAYS",
    help="Forget drafts that no branch and no tag stands for after so long [never: a commit may be pinned].",
)
@click.option("--max-file", metavar="SIZE", default="20GiB", show_default=True, help="Largest file taken in.")
@click.option(
    "--max-connections", type=click.IntRange(1), default=512, show_default=True, help="Connections at a time."
)
@click.option("--access-log", is_flag=True, help="Log every request to stderr.")
@click.pass_context
def registry(
    ctx: click.Context,
    /,
    port: int,
    host: str,
    store: Path | None,
    tokens: Path | None,
    max_file: str,
    **options: Any,
) -> None:
    """Serve a store as a registry: the Hugging Face protocol, and a web catalogue.

    \b
    hub registry --port 8000                                  (this machine only: everyone owns everything)
    hub registry token add ci --write acme --tokens tokens.json
    hub registry --host 0.0.0.0 --port 8000 --tokens tokens.json

    Clients need nothing but HF_ENDPOINT=http://HOST:PORT, and HF_TOKEN where there are tokens. The address is
    printed to stdout once the server answers. Put a proxy with TLS in front of it on an open network.
    """
    if ctx.invoked_subcommand is not None:
        return
    from hub.console.sizes import parse_size
    from hub.errors import UsageError
    from hub.io.listen import is_loopback, require_extra

    if tokens is None and not is_loopback(host):
        raise UsageError(
            f"without tokens the registry serves this machine only, not {host}",
            hint="make some with `hub registry token add NAME --write NS --tokens FILE`, then give --tokens FILE",
        )
    require_extra()
    _serve(host, port, store, tokens, parse_size(max_file), **options)


def _serve(
    host: str,
    port: int,
    root: Path | None,
    tokens: Path | None,
    max_file: int,
    *,
    visibility: str | None,
    keep_drafts: float | None,
    max_connections: int,
    access_log: bool,
) -> None:
    from hub.io.listen import listen
    from hub.registry.app import create_app
    from hub.registry.limits import Limits
    from hub.registry.tokens import Tokens
    from hub.store import Store

    store = Store(root)
    app = create_app(
        store,
        authority=Tokens(tokens) if tokens else None,
        visibility=visibility,
        keep=None if keep_drafts is None else keep_drafts * 86400,
        limits=Limits(file=max_file, commit=2 * max_file, inline=min(Limits.inline, max_file)),
    )
    listen(
        app,
        host,
        port,
        access_log=access_log,
        connections=max_connections,
        announce=lambda url: _announce(url, store, tokens),
    )


def _announce(url: str, store: object, tokens: Path | None) -> None:
    click.echo(f"serving {getattr(store, 'where', store)}", err=True)
    if tokens is None:
        click.secho("no tokens: ", fg="yellow", bold=True, nl=False, err=True)
        click.echo("this machine only, and everyone on it may read and change everything", err=True)
    else:
        click.echo(f"tokens: {tokens}", err=True)
    click.echo(f"clients: HF_ENDPOINT={url}", err=True)
    click.echo(url)


@registry.group()
def token() -> None:
    """Make, list and revoke access tokens. The file holds hashes only."""


_FILE = click.option(
    "--tokens", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The tokens file; made if needed."
)


@token.command("add")
@click.argument("name")
@click.option("--read", "read_scopes", multiple=True, metavar="NS", help="May read what is private in NS ('*': all).")
@click.option("--write", "write_scopes", multiple=True, metavar="NS", help="Owns NS: may read and change all of it.")
@_FILE
def token_add(name: str, read_scopes: tuple[str, ...], write_scopes: tuple[str, ...], tokens: Path) -> None:
    """Make a token NAME and print it to stdout. It is shown once and kept nowhere."""
    from hub.registry.tokens import add

    text = add(tokens, name, read_scopes=read_scopes, write_scopes=write_scopes)
    click.echo(f"token {name} is in {tokens}; give it to clients as HF_TOKEN, it is not shown again", err=True)
    click.echo(text)


@token.command("list")
@_FILE
def token_list(tokens: Path) -> None:
    """List the tokens and what they may do."""
    from hub.registry.tokens import read

    for entry in read(tokens).tokens:
        scopes = [f"write {scope}" for scope in entry.write] + [f"read {scope}" for scope in entry.read]
        click.echo(f"{entry.name}\t{', '.join(scopes)}\t{entry.created:%Y-%m-%d}" if entry.created else entry.name)


@token.command("revoke")
@click.argument("name")
@_FILE
def token_revoke(name: str, tokens: Path) -> None:
    """Take the token NAME out; running servers refuse it at once."""
    from hub.registry.tokens import revoke

    revoke(tokens, name)
    click.echo(f"token {name} is dead", err=True)
