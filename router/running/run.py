"""One run from its input to its output: checks before anything is loaded, the engine, and on after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from compose.algebra import parse
from compose.base.at_hand import at_hand
from compose.planning.held import held_as, manifests_of
from compose.planning.members import AdapterFinder, AdapterSource, looks_like_path
from hub.console.progress import Progress, quiet
from hub.console.sizes import parse_size
from hub.errors import UsageError
from hub.io.canonical_json import digest, dumps
from hub.io.files import sha256_file
from router.engine.engine import Engine
from router.running.job import Outcome, Sink, Stream, check, check_adapters, go
from router.running.journal import Journal, refuse_finished
from router.running.lines import Lines
from router.running.rows import Options


def run(
    source: str | Path | BinaryIO,
    out: str | Path | BinaryIO,
    *,
    base: str | None = None,
    quantize: str | None = None,
    dtype: str = "auto",
    batch_size: int = 32,
    resident: str = "4GiB",
    allow_base_drift: bool = False,
    overwrite: bool = False,
    progress: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(quiet),
    on_resume: Callable[[int], None] = lambda _: None,
    **options: Any,
) -> Outcome:
    """Run JSONL rows through a base and its adapters; each comes out with its answer added.

    >>> run("mails.jsonl", "answers.jsonl", adapter="acme/triage", scores=3)

    Parameters
    ----------
    source, out
        Files or binary streams. A file that an interrupted run has begun is gone on with, to the same bytes.
    base
        The base model; None is the one that ``adapter`` was made for.
    quantize, dtype
        How the base is held: None is as ``adapter`` was trained, which is said on stderr. The dtype is "auto" (fp32 on
        a CPU), "fp32", "bf16" or "fp16".
    batch_size, resident
        Rows computed together, and the size of the adapters kept in memory.
    overwrite
        Replace ``out``, and forget a run that was interrupted.
    progress, on_resume
        What shows the bytes read, and what is told the rows that an interrupted run has computed.
    options
        Fields of `router.running.rows.Options`: ``adapter``, ``adapter_column``, ``text``, ``max_new_tokens``, ...

    Raises
    ------
    HubError
        Options, a base or an adapter that do not fit, an output that is there; the first bad line, named by number.
    """
    shared = Options(**options)
    file = Path(source) if isinstance(source, str | Path) else None
    _check_places(file, out, overwrite)
    finder = AdapterFinder()
    base = base or _base_of(shared, finder)
    quantize = _held(quantize, shared, finder)
    with Path(source).open("rb") if isinstance(source, str | Path) else nullcontext(source) as stream:
        lines = Lines(stream, "stdin" if file is None else str(source))
        named: dict[str, int] = {}
        if file is not None and shared.on_error == "stop":
            named = check(Lines(stream, lines.name), shared)  # before the base is loaded, and hours of computing
            stream.seek(0)
        directories = _directories(shared, finder)
        contents = {f"the content of {ref}": _content(Path(str(place))) for ref, place in directories.items()}
        engine = _engine(base, quantize, dtype, batch_size, resident, allow_base_drift, directories)
        sink = _sink(out, engine, {**asdict(shared), **contents}, overwrite)
        try:
            if isinstance(sink, Journal) and sink.resumed:
                _go_on(lines, sink, engine)
                on_resume(sink.mark.rows)
            engine.sources.pinned = True  # one run is of one state of the store
            check_adapters(engine, named, lines.name)
            with progress() as bar:
                total = 0 if file is None else file.stat().st_size - lines.offset
                outcome = go(engine, lines, shared, sink, advance=bar("rows", total))
            sink.finish()
            return outcome
        finally:
            engine.close()
            sink.close()


def _check_places(source: Path | None, out: str | Path | BinaryIO, overwrite: bool) -> None:
    """Refuse an output that is the input, or that is there and finished: before the base is loaded."""
    if not isinstance(out, str | Path):
        return
    out = Path(out)
    if source is not None and out.exists() and out.samefile(source):
        raise UsageError(f"{out} is the input", path=out, hint="give another --out: the input is read while it runs")
    if not overwrite:
        refuse_finished(out)


def _base_of(options: Options, finder: AdapterFinder) -> str:
    """The base that the first adapter of an expression was made for; of a directory, what its config names."""
    if options.adapter is None:
        raise UsageError("nothing says which base the rows are for", hint="--base BASE")
    refs = parse(options.adapter).refs
    base = next((at_hand(m.base) for m in manifests_of(refs, finder) if m.base is not None), None)
    named = (finder.find(ref).config.get("base_model_name_or_path") for ref in refs if looks_like_path(ref))
    base = base or next((str(name) for name in named if name), None)
    if base is None:
        raise UsageError(f"{options.adapter} does not say which base it was made for", hint="--base BASE")
    return base


def _held(quantize: str | None, options: Options, finder: AdapterFinder) -> str:
    if quantize is not None or options.adapter is None:
        return quantize or "none"
    return held_as(None, manifests_of(parse(options.adapter).refs, finder))


def _directories(options: Options, finder: AdapterFinder) -> dict[str, AdapterSource]:
    """Directories that the expression for all rows names; a row of a file names none."""
    refs = () if options.adapter is None else parse(options.adapter).refs
    return {ref: finder.source(ref) for ref in refs if looks_like_path(ref)}


def _content(directory: Path) -> str:
    """Digest of all that is read of an adapter's directory: configurations and tensors."""
    files = sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors") and p.is_file())
    return digest(dumps({path.name: sha256_file(path)[0] for path in files}))


def _engine(
    base: str,
    quantize: str,
    dtype: str,
    rows: int,
    resident: str,
    allow_base_drift: bool,
    directories: Mapping[str, AdapterSource],
) -> Engine:
    on_cpu = not torch.cuda.is_available()
    return Engine(
        base,
        adapters=directories,
        quantize=quantize,
        dtype=("fp32" if on_cpu else None) if dtype == "auto" else dtype,
        rows=rows,
        resident=parse_size(resident),
        allow_base_drift=allow_base_drift,
    )


def _sink(out: str | Path | BinaryIO, engine: Engine, options: Mapping[str, Any], overwrite: bool) -> Sink:
    if not isinstance(out, str | Path):
        return Stream(out)
    host = engine.host
    settings = {
        "base": [host.name, host.identity.weights_fingerprint, host.held],
        "batch_size": engine.rows,
        "resident": engine.residency.budget,
        **options,
    }
    return Journal(Path(out), settings, overwrite=overwrite)


def _go_on(lines: Lines, sink: Journal, engine: Engine) -> None:
    """Move the input to where an interrupted run was, and let refs mean what they meant then."""
    mark = sink.mark
    if not lines.skip(mark.offset, lines=mark.rows) or (mark.offset and lines.sha256 != mark.sha256):
        raise UsageError(
            f"{lines.name} is not the input that {sink.out} was begun with",
            path=sink.path,
            hint="give the same input to go on, or --overwrite to begin anew",
        )
    engine.sources.pins.update(sink.pins)
