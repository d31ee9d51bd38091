"""HTTP of an OCI registry: the distribution API's requests, with logins, limits and errors that say what to do."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlencode, urljoin, urlsplit

from hub.errors import Conflict, HubError, IntegrityError, ManifestError, NotFound, RefError, RemoteError, UsageError
from hub.io import canonical_json as canonical
from hub.io.files import CHUNK
from hub.io.parallel import MOST_JOBS
from hub.ref import check_digest
from hub.storage.staging import Advance

if TYPE_CHECKING:
    from requests import Response

TIMEOUT = (10.0, 120.0)  # seconds to connect, and between two bytes
MAX_PAGES = 1000
_TRIES = 3  # of what can be sent again
_ODD = "is it an OCI registry? look at the URL"


class Wire:
    """Requests to one registry.

    Parameters
    ----------
    host
        ``host`` or ``host:port``; plain HTTP on loopback.
    url
        How messages call the place.
    """

    def __init__(self, host: str, url: str) -> None:
        try:
            import requests
            from oras.auth import get_auth_backend
            from oras.logger import setup_logger
        except ImportError as error:
            raise UsageError(
                f"oci:// needs a package that is not installed: {error}", hint='pip install "moduloom[oci]"'
            ) from error
        setup_logger(quiet=True)  # errors are ours to tell
        self.url, self._host = url, host
        self.base = f"{'http' if _is_loopback(host) else 'https'}://{host}"
        self._session = requests.Session()
        for scheme in ("http://", "https://"):  # a connection for each blob that moves
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=MOST_JOBS))
        self._session.trust_env = not _is_loopback(host)  # no proxy, and no .netrc, for this machine itself
        self._failure = requests.RequestException
        self._backend = get_auth_backend
        self._login: dict[str, str] = {}

    def pages(self, path: str, field: str, *, optional: bool = False) -> list[str]:
        """Texts of a list in JSON, all its pages; none where there is no such list.

        `optional` is a list that a registry need not give, to nobody or not to this caller.
        """
        absent = (401, 403, 404, 405) if optional else (404,)
        texts, url = list[str](), self.base + path
        for _ in range(MAX_PAGES):
            with self._send("GET", url, stream=True) as answer:
                if answer.status_code in absent:
                    break
                data = self._body(self._good(answer, path), path)
                link = answer.links.get("next", {}).get("url")
            texts += self._texts(data, path, field)
            if link is None:
                break
            url = urljoin(url, link)
        return texts

    def _texts(self, data: bytes, path: str, field: str) -> list[str]:
        try:
            document = canonical.loads(data, what=f"{self.url}{path}")
        except ManifestError as error:
            raise RemoteError(error.message, hint=_ODD) from error
        texts = document.get(field) if isinstance(document, dict) else None
        if texts is None:  # what docker-registry says of a repository without tags
            return []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RemoteError(f"{self.url}{path} is not a list of texts", hint=_ODD)
        return texts

    def digest(self, path: str, accept: str) -> str | None:
        """Digest that a manifest's tag stands for now; None where there is no such tag."""
        with self._send("HEAD", self.base + path, headers={"Accept": accept}) as answer:
            if answer.status_code == 404:
                return None
            digest: str | None = self._good(answer, path).headers.get("Docker-Content-Digest")
        if digest is None:
            return canonical.digest(self.get(path, path, accept=accept))
        try:
            return check_digest(digest)
        except RefError as error:
            raise RemoteError(f"{self.url} names no digest of {path}: {error.message}", hint=_ODD) from error

    def size(self, path: str) -> int | None:
        """Bytes of a blob; None where it is not there."""
        with self._send("HEAD", self.base + path) as answer:
            if answer.status_code == 404:
                return None
            length = self._good(answer, path).headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else -1

    def get(self, path: str, about: str, *, accept: str = "*/*") -> bytes:
        """All bytes of a small answer."""
        with self._send("GET", self.base + path, headers={"Accept": accept}, stream=True) as answer:
            return self._body(self._good(answer, about), about)

    def stream(self, path: str, offset: int, about: str) -> Iterator[bytes]:
        """Bytes of a blob from an offset on; a registry that knows no ranges sends what comes before as well."""
        headers = {"Range": f"bytes={offset}-", "Accept-Encoding": "identity"}
        with self._send("GET", self.base + path, headers=headers, stream=True) as answer:
            skip = offset if self._good(answer, about).status_code == 200 else 0
            with self._translated(about):
                for chunk in answer.iter_content(CHUNK):
                    yield chunk[skip:]
                    skip = max(skip - len(chunk), 0)

    def put(self, path: str, data: bytes, media_type: str, about: str) -> None:
        """Write a manifest; again where the registry stumbles (5xx), as docker's may when several write one tag."""
        for tried in range(1, _TRIES + 1):
            with self._send("PUT", self.base + path, headers={"Content-Type": media_type}, data=data) as answer:
                if answer.status_code < 500 or tried == _TRIES:
                    self._good(answer, about)
                    return
            time.sleep(0.2 * tried)

    def drop(self, path: str) -> bool:
        """Delete a manifest; False where this registry, or this login, deletes none."""
        with self._send("DELETE", self.base + path) as answer:
            return answer.status_code < 400

    def upload(self, repo: str, digest: str, file: BinaryIO, size: int, advance: Advance) -> None:
        """Upload a blob in one piece."""
        about = f"the blob {digest[:19]}..."
        start = f"{self.base}/v2/{repo}/blobs/uploads/"
        with self._send("POST", start) as answer:
            place = urljoin(start, self._good(answer, about).headers.get("Location", ""))
        place += ("&" if urlsplit(place).query else "?") + urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._send(
            "PUT", place, headers=headers, data=_CountedFile(file, size, advance) if size else b""
        ) as answer:
            self._good(answer, about)

    def upload_bytes(self, repo: str, data: bytes) -> None:
        """Upload a small blob that may be there already."""
        digest = canonical.digest(data)
        if self.size(f"/v2/{repo}/blobs/{digest}") != len(data):
            self.upload(repo, digest, BytesIO(data), len(data), lambda _count: None)

    def _send(self, method: str, url: str, *, headers: dict[str, str] | None = None, **how: Any) -> Response:
        """One request; a second one where the registry first wants to know who asks."""
        ours = urlsplit(url).netloc == self._host  # a login is for this registry alone
        with self._translated(url):
            own = {**(headers or {}), **(self._login if ours else {})}
            answer = self._session.request(method, url, headers=own, timeout=TIMEOUT, **how)
            if answer.status_code != 401 or not ours or isinstance(how.get("data"), _CountedFile):
                return answer
            answer.close()
            self._login = self._log_in(answer)
            again = {**(headers or {}), **self._login}
            return self._session.request(method, url, headers=again, timeout=TIMEOUT, **how)

    def _log_in(self, answer: Response) -> dict[str, str]:
        """Header that answers a challenge, with the logins of docker and podman; none where there is no login."""
        from oras.container import Container

        kind = "basic" if answer.headers.get("Www-Authenticate", "").lower().startswith("basic") else "token"
        backend = self._backend(kind, self._session, self.base.startswith("http:"), tls_verify=True)
        try:
            backend.load_configs(Container("any/name", registry=self._host), configs=_login_files())
            headers, _ = backend.authenticate_request(answer, {}, refresh=True)
        except (ValueError, AttributeError):  # no login for this host: oras says so in several ways
            return {}
        return {key: value for key, value in headers.items() if key == "Authorization"}

    def _good(self, answer: Response, about: str) -> Response:
        """Give the answer back where it is one; else an error that says what to do."""
        status = answer.status_code
        if status < 400:
            return answer
        reason = " ".join(self._body(answer, about)[:300].decode(errors="replace").split())
        text = f"{self.url} refuses {about} ({status}){': ' + reason if reason else ''}"
        answer.close()
        if status == 404:
            raise NotFound(f"{self.url} has no {about}", hint="push it there again")
        if status in (401, 403):
            raise RemoteError(text, hint=f"log in: docker login {self._host}")
        if status in (409, 412):
            raise Conflict(text, hint="look what is there now")
        if "DIGEST_INVALID" in reason:
            raise IntegrityError(text, hint="`hub verify` shows what is damaged here")
        raise RemoteError(text)

    def _body(self, answer: Response, about: str) -> bytes:
        """All bytes of an answer that must be small."""
        data = bytearray()
        with self._translated(about):
            for chunk in answer.iter_content(2**16):
                data += chunk
                if len(data) > canonical.MAX_JSON:
                    raise RemoteError(f"{self.url} sends more than {canonical.MAX_JSON} bytes for {about}")
        return bytes(data)

    @contextmanager
    def _translated(self, about: str) -> Iterator[None]:
        try:
            yield
        except HubError:
            raise
        except self._failure as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            hint = f"is there a registry at {self._host}? check the network"
            raise RemoteError(f"{self.url} cannot be reached for {about}: {reason}", hint=hint) from error


class _CountedFile:
    """A file that tells how much of it was read, with a length, so that it is sent in one piece."""

    def __init__(self, file: BinaryIO, size: int, advance: Advance) -> None:
        self._file, self._size, self._advance = file, size, advance

    def __len__(self) -> int:
        return self._size

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self._advance(len(data))
        return data

    def __iter__(self) -> Iterable[bytes]:
        while chunk := self.read(2**20):
            yield chunk


def _is_loopback(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _login_files() -> list[str]:
    """Files of logins beside ``~/.docker/config.json``, which oras reads by itself: docker's elsewhere, podman's."""
    directories = {"DOCKER_CONFIG": "config.json", "XDG_RUNTIME_DIR": "containers/auth.json"}
    files = [Path(os.environ[name], file) for name, file in directories.items() if os.environ.get(name)]
    files += [Path(os.environ["REGISTRY_AUTH_FILE"])] if os.environ.get("REGISTRY_AUTH_FILE") else []
    return [str(path) for path in files if path.exists()]
