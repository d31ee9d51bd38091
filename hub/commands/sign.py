"""``hub sign``."""

from __future__ import annotations

from pathlib import Path

import click

from hub.commands._output import json_option, print_json, say, warn


@click.command()
@click.argument("target", metavar="REF|DIR")
@click.option("--key", type=click.Path(path_type=Path), required=True, help="Your private key (PEM, elliptic curve).")
@click.option("--out", "signature", type=click.Path(path_type=Path), help="Write it there [into the store].")
@json_option
def sign(target: str, key: Path, signature: Path | None, as_json: bool) -> None:
    """Sign an artifact with your key, offline; `hub verify REF --key` checks it.

    \b
    hub sign acme/tone@1.0.0 --key author.pem
    hub sign acme/tone@1.0.0 --key author.pem --out tone.sig
    hub verify acme/tone@1.0.0 --key author.pub.pem --signature tone.sig

    The signature lists the sha256 of every file, in the format of model-signing, which is an extra: pip install
    'moduloom[sign]'. A pair of keys is made once; the .pub.pem is for all who check, the other for you alone:

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out author.pem
    openssl ec -in author.pem -pubout -out author.pub.pem
    """  # noqa: D301  (\b is click's mark for text that is not rewrapped)
    import hub

    signed = hub.sign(target, key, signature=signature)
    if key.stat().st_mode & 0o077:
        warn(f"others on this machine can read {key}; chmod 600 {key}")
    if as_json:
        print_json(signed.as_dict())
    else:
        say(f"{signed.about} is signed by {signed.key[:16]}...: {signed.signature}")
