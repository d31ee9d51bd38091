"""The stock client of the Hugging Face Hub, with errors that say what to do, and what its cache still knows offline."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from hub.errors import Conflict, HubError, RemoteError, UsageError
from hub.io import canonical_json as canonical
from hub.io.files import read_capped
from hub.manifest import MANIFEST_NAME
from hub.ref import check_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi


DEFAULT_ENDPOINT = "https://huggingface.co"


class Tag(NamedTuple):
    """A name of a commit; `hidden` where it is no ref that the client can ask for by name."""

    name: str
    commit: str
    hidden: bool = False


class Offline(RemoteError):
    """The endpoint cannot be reached, or must not be."""


class Client:
    """`HfApi` of one endpoint.

    Parameters
    ----------
    endpoint
        ``https://host``.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    @cached_property
    def api(self) -> HfApi:
        """The client itself; what it raises is for `translated`."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, library_name="moduloom")

    def download(self, repo: str, path: str, tag: Tag, *, anew: bool = False) -> Path:
        """Where the client's cache has a file; the file itself, as the cache keeps links."""
        from huggingface_hub import constants, try_to_load_from_cache

        cache = constants.HF_HUB_CACHE
        if not anew:
            cached = try_to_load_from_cache(repo, path, cache_dir=cache, revision=tag.commit)
            if isinstance(cached, str):
                return Path(cached).resolve()
        # By the name of the tag, so that the cache knows it offline; a yanked version is no ref, but its commit is.
        revision = tag.commit if tag.hidden else tag.name
        with self.translated(repo):
            place = self.api.hf_hub_download(
                repo, path, revision=revision, cache_dir=cache, force_download=anew, **_silently()
            )
        return Path(place).resolve()

    @contextmanager
    def translated(self, about: str) -> Iterator[None]:
        """Turn what the client raises into errors that say what to do."""
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            yield
        except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise self._offline(about, error) from error
        except HfHubHTTPError as error:
            raise self._refusal(about, error) from error
        except transport_error() as error:
            raise self._offline(about, error) from error

    def _offline(self, about: str, error: Exception) -> Offline:
        hint = "check the network and HF_ENDPOINT; what was pulled before works offline"
        return Offline(f"{self.endpoint} cannot be reached for {about}: {_first_line(error)}", hint=hint)

    def _refusal(self, about: str, error: Any) -> HubError:
        status = getattr(error.response, "status_code", 0)
        reason = error.server_message or _first_line(error)
        text = f"{self.endpoint} refuses {about} ({status}): {' '.join(reason.split())[:300]}"
        if status in (409, 412):
            return Conflict(text, hint="look what is there now, then push again")
        if status in (401, 403):
            return RemoteError(text, hint="log in with `hf auth login`, or set HF_TOKEN to a token that may do this")
        return RemoteError(text)


def parse(url: str) -> tuple[str, str | None]:
    """Endpoint and namespace of a URL. Raises UsageError."""
    parts = urlsplit(url)
    hint = "write hf://, hf://namespace, hf+https://host or hf+https://host/namespace"
    if parts.query or parts.fragment or parts.username:
        raise UsageError(f"{url} has more than a host and a namespace", hint=hint)
    scheme, path = parts.scheme.lower(), parts.path.strip("/")
    if scheme == "hf":
        endpoint, namespace, rest = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, parts.netloc, path
    else:
        endpoint, (namespace, _, rest) = f"{scheme.removeprefix('hf+')}://{parts.netloc}", path.partition("/")
    if rest or (scheme != "hf" and not parts.netloc):
        raise UsageError(f"{url} is not a registry and a namespace", hint=hint)
    return endpoint.rstrip("/"), check_name(namespace, what="namespace") if namespace else None


def cached_manifests(repo: str) -> Iterable[tuple[list[Tag], bytes]]:
    """Manifests of a repository in the client's cache, which does not tell endpoints apart, with their refs."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [cached for cached in scan_cache_dir(constants.HF_HUB_CACHE).repos if cached.repo_id == repo]
    except CacheNotFound:
        return
    for revision in (revision for cached in repos for revision in cached.revisions):
        manifest = next((file for file in revision.files if file.file_name == MANIFEST_NAME), None)
        data = read_capped(manifest.blob_path, canonical.MAX_JSON) if manifest else b""
        if manifest and fits_name(data, manifest.blob_path.name):
            yield [Tag(ref, revision.commit_hash) for ref in revision.refs], data


def transport_error() -> type[Exception]:
    """Base of what the client's transport raises; which library that is depends on the client's version."""
    library: Any = import_module("httpx2" if find_spec("httpx2") else "httpx")
    error: type[Exception] = library.HTTPError
    return error


def fits_name(data: bytes, name: str) -> bool:
    """Whether bytes are those of their entity tag, by which the cache names its blobs; True for any other name."""
    if len(name) == 64:
        return hashlib.sha256(data).hexdigest() == name
    if len(name) == 40:
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest() == name
    return True


@cache
def _silently() -> dict[str, Any]:
    """Option of a download that shows no bar, since ours does and several files move at once; old clients have none."""
    from huggingface_hub import HfApi

    bar: Any = import_module("huggingface_hub.utils").tqdm

    def begin(self: Any, *args: Any, **options: Any) -> None:
        bar.__init__(self, *args, **{**options, "disable": True})

    silent = {"tqdm_class": type("Silent", (bar,), {"__init__": begin})}
    return silent if "tqdm_class" in signature(HfApi.hf_hub_download).parameters else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
