"""How much the registry takes in; everything beyond is answered with 413 before it is stored."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Caps, in bytes unless said otherwise.

    Attributes
    ----------
    file
        One file.
    commit
        All files of one commit together.
    inline
        Up to this size a file travels inside the commit (base64), which every client can do; a larger one goes
        through git-lfs, which a client with Xet switched on cannot (it is told to set HF_HUB_DISABLE_XET=1).
    json
        A JSON or form body, and all of a commit's lines but the file contents.
    operations
        Operations in one commit (a count).
    uploads
        Uploads in progress at one time (a count); more wait.
    idle
        Seconds without a byte after which an upload is given up.
    """

    file: int = 20 * 1024 * MIB
    commit: int = 40 * 1024 * MIB
    inline: int = 512 * MIB
    json: int = 4 * MIB
    operations: int = 10_000
    uploads: int = 64
    idle: float = 60.0
