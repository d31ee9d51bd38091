"""Signatures of artifacts with one's own key, offline, by model-signing (github.com/sigstore/model-transparency).

A signature is a Sigstore bundle over an in-toto statement that lists the sha256 of every file of the artifact,
``module.json`` included. It is kept apart from the artifact, whose digest it must not change: in the store by digest
and key (`hub.storage.signatures`), where push and pull take it along, or in any file. Stock ``model_signing verify key
DIR`` accepts it for the directory that ``hub pull REF --out DIR`` writes.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub.errors import IntegrityError, NotFound, UsageError
from hub.io.files import atomic_write, read_capped
from hub.manifest import MANIFEST_NAME
from hub.pack import check_directory
from hub.storage.signatures import MAX_SIGNATURE

if TYPE_CHECKING:
    from hub.store import Store

_MAX_KEY = 64 * 2**10  # bytes
_MAKE_KEY = (
    "make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem; "
    "openssl ec -in KEY.pem -pubout -out KEY.pub.pem"
)


@dataclass(frozen=True)
class Signed:
    """A signature that holds: what it is of, sha256 of the public key's PEM, and where it is."""

    about: str
    key: str
    signature: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def sign(store: Store, target: str, key: Path, signature: Path | None = None) -> Signed:
    """Sign an artifact of the store, or an artifact directory, with a private elliptic-curve key (PEM).

    Parameters
    ----------
    target
        A ref, or a directory with ``module.json``; every byte is checked first.
    key
        An unencrypted private key on P-256, P-384 or P-521.
    signature
        Where to write it; default: into the store.

    Raises
    ------
    UsageError, NotFound
        No such key, or one that cannot sign.
    IntegrityError
        The artifact is damaged.
    """
    name = _key_name(key, private=True)
    with _laid_out(store, target) as (directory, digest, about), tempfile.TemporaryDirectory() as room:
        place = signature or store.signatures.path(digest, name)
        young = Path(room) / "signature"
        _library("signing").Config().use_elliptic_key_signer(private_key=key).sign(directory, young)
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, young.read_bytes())
    return Signed(about, name, str(place))


def check(store: Store, target: str, key: Path, signature: Path | None = None) -> Signed:
    """Check the signature of an artifact or a directory against a public key (PEM).

    Raises
    ------
    NotFound
        There is no signature by that key.
    IntegrityError
        It is of another key, of other files, or is none.
    """
    name = _key_name(key, private=False)
    with _laid_out(store, target) as (directory, digest, about):
        place = signature or store.signatures.path(digest, name)
        if not place.is_file():
            raise NotFound(
                f"{about} has no signature by {key} here",
                ref=about,
                path=place,
                hint=_where_to_get(store, digest),
            )
        read_capped(place, MAX_SIGNATURE)
        with _told(key, about):
            _library("verifying").Config().use_elliptic_key_verifier(public_key=key).verify(directory, place)
    return Signed(about, name, str(place))


def _where_to_get(store: Store, digest: str) -> str:
    keys = sorted(store.signatures.of(digest))
    if keys:
        return f"it is signed by {', '.join(f'{key[:16]}...' for key in keys)}; is this the author's public key?"
    return "pull it again (signatures come with it), or give the author's file with --signature FILE"


def _library(part: str) -> Any:
    """A module of model-signing, which is an extra."""
    from importlib import import_module

    try:
        return import_module(f"model_signing.{part}")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"signatures need {error.name}, which is not installed", hint="pip install 'moduloom[sign]'"
        ) from error


def _key_name(path: Path, *, private: bool) -> str:
    """Hex sha256 of the public key's PEM: what the bundle calls the key."""
    _library("signing")  # an extra, which brings cryptography
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    place = path.expanduser().resolve()
    if not place.exists():
        raise NotFound(f"there is no key {path}", path=path, hint=_MAKE_KEY)
    data = read_capped(place, _MAX_KEY)
    kind = "private" if private else "public"
    try:
        if private:
            key: object = serialization.load_pem_private_key(data, None)
            key = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
        else:
            key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        hint = "--key of verify takes the public key" if not private and b"PRIVATE KEY" in data else _MAKE_KEY
        raise UsageError(f"{path} is no {kind} key that can be read: {error}", path=path, hint=hint) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError(f"{path} is no {kind} key on an elliptic curve", path=path, hint=_MAKE_KEY)
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, public)).hexdigest()


@contextmanager
def _laid_out(store: Store, target: str) -> Iterator[tuple[Path, str, str]]:
    """A fresh directory with the files of the artifact, all of them checked, its digest, and what to call it."""
    source = Path(target).expanduser()
    with tempfile.TemporaryDirectory(prefix="moduloom-sign-") as room:
        out = Path(room) / "artifact"
        if not source.is_dir():
            artifact = store.get(target)
            yield artifact.materialize(out), artifact.digest, str(artifact.ref)
            return
        manifest = check_directory(source)
        for name in (MANIFEST_NAME, *(entry.path for entry in manifest.files)):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, out / name)
        yield out, manifest.digest, target


@contextmanager
def _told(key: Path, about: str) -> Iterator[None]:
    from cryptography.exceptions import InvalidSignature

    try:
        yield
    except InvalidSignature as error:
        raise IntegrityError(f"the signature of {about} is not by {key}", ref=about) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise IntegrityError(
            f"the signature of {about} does not hold for {key}: {first[:300]}",
            ref=about,
            hint="get artifact, signature and key from their author again",
        ) from error
