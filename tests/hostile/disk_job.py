"""Do one thing to a store under a limit that only a process of its own can have.

    python disk_job.py put STORE DIRECTORY [--file-limit BYTES] [--as-nobody]

Prints what happened as JSON: {"ok": true} or the error's fields. Every module is imported before the limit holds.
"""

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path

import packaging.specifiers  # noqa: F401  (another user cannot read it later)

from hub.errors import HubError
from hub.project.gc import collect, plan
from hub.remotes import from_url
from hub.store import Store
from hub.transfer import pull


def act(job: str, store: Path, source: str) -> dict[str, object]:
    try:
        if job == "put":
            Store(store).put(source)
        elif job == "tag":
            Store(store).tag(source, "prod")
        elif job == "yank":
            Store(store).yank(source, "bad")
        elif job == "delete":
            Store(store).delete(source, "bad")
        elif job == "gc":
            collect(Store(store), plan(Store(store)))
        elif job == "pull":
            pull(Store(store), from_url(source), "acme/tone")
        else:
            return {"ok": True, "refs": [str(artifact.ref) for artifact in Store(store).list()]}
    except HubError as error:
        return error.as_dict()
    return {"ok": True}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["put", "tag", "yank", "delete", "gc", "pull", "list"])
    parser.add_argument("store", type=Path)
    parser.add_argument("source")
    parser.add_argument("--file-limit", type=int)
    parser.add_argument("--as-nobody", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as warm:
        act(options.job, Path(warm) / "store", options.source)
        Store(Path(warm) / "store").list()
    if options.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_limit, options.file_limit))
    if options.as_nobody and os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    print(json.dumps(act(options.job, options.store, options.source)))


if __name__ == "__main__":
    main()
