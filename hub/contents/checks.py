"""What the files of an artifact must be, checked wherever bytes come in: packed, pushed, pulled or uploaded.

No pickles, no code, no archives; safetensors without NaN or Inf; text that is text; tensors that are those the manifest
lists. What must hold besides before an artifact is published is said by the gates (`hub.gate`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from hub.contents.tensor_files import FileScan, refuse_nonfinite, scan, tensors_digest
from hub.errors import GateError, IntegrityError, ManifestError, suggest
from hub.io import canonical_json as canonical
from hub.io.files import CHUNK, open_regular, read_capped, sha256_file
from hub.manifest import Draft, FileEntry, Manifest, Role, TensorEntry

WEIGHTS: Final = "adapter_model.safetensors"
EXTRA: Final = "extra.safetensors"
CONFIG: Final = "adapter_config.json"
# What a tokenizer is made of, its chat template included; it may travel with an adapter, beside the weights.
TOKENIZER: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)
IGNORED = frozenset({".DS_Store", ".git", ".gitattributes", ".gitignore", ".cache"})
MAX_TEXT_FILE = 64 * 2**20  # bytes

REPACK: Final = "restore the file, or pack the change as a new version: hub push DIR --repack --version NEW"

_ROLES: dict[str, Role] = {
    CONFIG: "config",
    WEIGHTS: "weights",
    EXTRA: "extra",
    "README.md": "card",
    "probes.safetensors": "probes",
}
_TEXT = {".json", ".jsonl", ".md", ".txt", ".csv", ".yaml", ".yml", ".jinja"}
_BARE = {"LICENSE", "NOTICE", "CITATION.cff"}
_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".model"}
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_SENTENCEPIECE = {name for name in TOKENIZER if name.endswith(".model")}
_PIECES_START = b"\n"  # protobuf: field 1 of a SentencePiece model, its pieces, as a message


def role_of(path: str) -> Role:
    """Return what a file is in an artifact, from its path alone."""
    top = path.split("/", maxsplit=1)[0]
    if top == "aux" and top != path:
        return "aux"
    if top == "resume" and top != path:
        return "resume"
    return _ROLES.get(path, "other")


def check_file_set(paths: Iterable[str], draft: Draft) -> None:
    """Refuse files that an artifact does not hold: pickles first of all, code, archives, unknown types."""
    names = list(paths)
    for path in names:
        suffix = Path(path).suffix.lower()
        if path in _SENTENCEPIECE:
            continue
        if suffix in _PICKLED:
            raise GateError(
                f"{path} is a pickle or may be one; artifacts never hold pickles",
                path=path,
                hint="convert weights to safetensors (safetensors.torch.save_file) and delete the file",
            )
        if suffix not in _TEXT | {".safetensors", ".png"} and Path(path).name not in _BARE:
            raise GateError(
                f"{path} is no file of an artifact (safetensors, json, md, txt, csv, yaml, jinja, png)",
                path=path,
                hint=f"move {path} out of the directory",
            )
    required = (CONFIG, WEIGHTS) if draft.type in ("adapter", "merge") else ()
    for path in required:
        if path not in names:
            close = suggest(path, names)
            raise GateError(f"{draft.ref} has no {path}", ref=draft.ref, path=path, hint=close)


def inspect(path: Path, name: str, scanned: FileScan | None = None) -> tuple[FileEntry, FileScan | None]:
    """Hash one file and check what its bytes alone can tell.

    Parameters
    ----------
    path
        Where the bytes are.
    name
        Its relative path in the artifact, which decides what it must contain.
    scanned
        Its scan, where somebody has made it already.

    Raises
    ------
    GateError, IntegrityError
        Not safetensors, NaN or Inf; text that is no UTF-8 or holds NUL; a pickle under another name.
    """
    if name.endswith(".safetensors"):
        tensors = scanned or scan(path, name)
        refuse_nonfinite(tensors, name)
        return FileEntry(path=name, sha256=tensors.sha256, size=tensors.size, role=role_of(name)), tensors
    _check_content(path, name)
    sha256, size = sha256_file(path)
    return FileEntry(path=name, sha256=sha256, size=size, role=role_of(name)), None


def _check_content(path: Path, name: str) -> None:
    if name.endswith(".json"):
        data = read_capped(path, MAX_TEXT_FILE)
        _refuse_pickle(data, name)
        try:
            value = canonical.loads(data, what=name, limit=MAX_TEXT_FILE)
        except ManifestError as error:
            raise GateError(error.message, path=name) from error
        if name == CONFIG and not isinstance(value, dict):
            raise GateError(f"{name} is not a JSON object", path=name)
        return
    with open_regular(path) as file:
        start = file.read(len(_PNG_START))
        _refuse_pickle(start, name)
        if name in _SENTENCEPIECE:
            if not start.startswith(_PIECES_START) or path.stat().st_size > MAX_TEXT_FILE:
                raise GateError(f"{name} is no SentencePiece model of at most {MAX_TEXT_FILE} bytes", path=name)
            return
        if name.endswith(".png"):
            if start != _PNG_START:
                raise GateError(f"{name} is not a PNG image", path=name)
            return
        decoder, part, size = codecs.getincrementaldecoder("utf-8")(), start, 0
        while True:
            size += len(part)
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                raise GateError(f"{name} is not UTF-8 text ({error.reason})", path=name) from error
            if b"\0" in part or size > MAX_TEXT_FILE:
                raise GateError(f"{name} is not text, or has over {MAX_TEXT_FILE} bytes", path=name)
            if not part:
                return
            part = file.read(CHUNK)


def _refuse_pickle(start: bytes, name: str) -> None:
    if _PICKLE_START.match(start):
        raise GateError(f"{name} holds a pickle or an archive under another name", path=name)


def inspect_as(
    manifest: Manifest, entry: FileEntry, path: Path, *, hint: str = REPACK, scanned: FileScan | None = None
) -> FileScan | None:
    """`inspect` a file that must be the one a manifest lists.

    Parameters
    ----------
    manifest, entry
        What it must be.
    path
        Where the bytes are.
    hint
        The next step when they are others.
    scanned
        Its scan, where somebody has made it already.

    Raises
    ------
    IntegrityError
        Other bytes; that says more than what a gate may find in them, so it comes first.
    GateError
        The right bytes, which must not be admitted.
    """
    try:
        measured, scanned_file = inspect(path, entry.path, scanned)
    except (GateError, IntegrityError) as error:
        sha256, size = sha256_file(path)
        if (sha256, size) == (entry.sha256, entry.size):
            raise
        raise _changed(manifest, entry, sha256, size, hint) from error
    if (measured.sha256, measured.size) != (entry.sha256, entry.size):
        raise _changed(manifest, entry, measured.sha256, measured.size, hint)
    return scanned_file


def _changed(manifest: Manifest, entry: FileEntry, sha256: str, size: int, hint: str) -> IntegrityError:
    how = f"truncated to {size} bytes" if size < entry.size else f"sha256 {sha256[:16]}... with {size} bytes"
    return IntegrityError(
        f"{manifest.ref}: {entry.path} is not the file that was packed ({how}; module.json says "
        f"{entry.sha256[:16]}... with {entry.size} bytes)",
        ref=manifest.ref,
        digest=entry.digest,
        path=entry.path,
        hint=hint,
    )


def join_tensors(scans: Mapping[str, FileScan]) -> tuple[TensorEntry, ...]:
    """Tensors of the weights and the extra file together, sorted by name; a name in both is refused."""
    entries: dict[str, TensorEntry] = {}
    for path in (WEIGHTS, EXTRA):
        for tensor in scans[path].tensors if path in scans else ():
            if tensor.entry.name in entries:
                raise GateError(f"tensor {tensor.entry.name} stands in {WEIGHTS} and in {EXTRA}", path=EXTRA)
            entries[tensor.entry.name] = tensor.entry
    return tuple(entries[name] for name in sorted(entries))


def zero_warnings(scans: Mapping[str, FileScan]) -> tuple[str, ...]:
    """Flag low-rank factors B that are all zero: such an adapter changes nothing there."""
    factors = [tensor for file in scans.values() for tensor in file.tensors if "lora_B" in tensor.entry.name]
    factors += [t for file in scans.values() for t in file.tensors if "lora_embedding_B" in t.entry.name]
    zero = sorted(tensor.entry.name for tensor in factors if tensor.zero)
    if not zero:
        return ()
    where = "every" if len(zero) == len(factors) else f"{len(zero)} of {len(factors)}"
    return (f"{where} lora_B is all zero (first: {zero[0]}): the adapter changes nothing there",)


def check_agreement(manifest: Manifest, scans: Mapping[str, FileScan]) -> None:
    """Compare the tensors of the files with those the manifest lists.

    Raises
    ------
    GateError
        Missing or extra tensors, by name.
    IntegrityError
        A tensor of another dtype, shape or content, or a wrong `tensors_digest`.
    """
    present = {entry.name: entry for entry in join_tensors(scans)}
    listed = {entry.name: entry for entry in manifest.tensors}
    for what, names in (("misses", listed.keys() - present.keys()), ("has extra", present.keys() - listed.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise GateError(f"{manifest.ref} {what} {len(names)} tensors: {shown}", ref=manifest.ref)
    for name, entry in listed.items():
        if entry != present[name]:
            raise IntegrityError(
                f"{manifest.ref}: tensor {name} is {present[name].dtype}{list(present[name].shape)} "
                f"{present[name].sha256[:12]}, its manifest says {entry.dtype}{list(entry.shape)} {entry.sha256[:12]}",
                ref=manifest.ref,
            )
    if tensors_digest(present.values()) != manifest.tensors_digest:
        raise IntegrityError(f"{manifest.ref}: tensors_digest does not fit its tensors", ref=manifest.ref)
