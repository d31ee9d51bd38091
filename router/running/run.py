"""One run from its input to its output: checks before anything is loaded, the engine, and on after an interruption."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from compose.algebra import parse
from compose.base.at_hand import at_hand
from compose.planning.held import held_as, manifests_of
from compose.planning.members import AdapterFinder, AdapterSource
from hub.console.progress import Progress, quiet
from hub.console.sizes import parse_size
from hub.contents.rows import Rows, open_rows
from hub.errors import UsageError
from hub.io.canonical_json import digest, dumps
from hub.io.files import sha256_file
from hub.store import Artifact
from router.engine.engine import Engine
from router.router import NO_TASK
from router.running.job import Outcome, Sink, Stream, check, check_adapters, go
from router.running.journal import Journal, refuse_finished
from router.running.rows import Options
from router.running.tables import is_table, write_table
from router.scorer import SCORERS


def run(
    source: str | Path | BinaryIO,
    out: str | Path | BinaryIO,
    *,
    base: str | None = None,
    quantize: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    batch_size: int = 32,
    resident: str = "4GiB",
    allow_base_drift: bool = False,
    overwrite: bool = False,
    progress: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(quiet),
    on_resume: Callable[[int], None] = lambda _: None,
    **options: Any,
) -> Outcome:
    """Run rows through a base and its adapters; each comes out with its answer added.

    >>> run("mails.jsonl", "answers.jsonl", adapter="acme/triage", scores=3)

    Parameters
    ----------
    source, out
        Files (JSON lines, CSV, TSV or Parquet, by their suffix; the input and JSON lines also gzipped), or binary
        streams of JSON lines. A file that an interrupted run has begun is gone on with, to the same bytes.
    base
        The base model; None is the one that ``adapter`` was made for.
    quantize, dtype
        How the base is held: None is as ``adapter`` was trained, which is said on stderr. The dtype is "auto" (fp32 on
        a CPU), "fp32", "bf16" or "fp16".
    device
        Where it is computed: "cpu", "cuda:1"; None is a GPU where there is one.
    adapters
        Name in an expression -> a directory or a ref. Directories that ``adapter`` names are found anyway.
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
    finder = AdapterFinder(given=adapters)
    given = _given(shared, finder)
    base = base or _base_of(shared, finder)
    quantize = _held(quantize, shared, finder)
    named: dict[str, int] = {}
    if file is not None and shared.on_error == "stop":
        with open_rows(file) as lines:
            named = check(lines, shared)  # before the base is loaded, and hours of computing
    with open_rows(source) as lines:
        engine = _engine(base, quantize, dtype, batch_size, resident, allow_base_drift, device=device, adapters=given)
        try:
            sink = _sink(out, engine, shared, overwrite, given)
            try:
                return _go(engine, lines, shared, sink, named, file, progress, on_resume)
            finally:
                sink.close()
        finally:
            engine.close()


def _go(
    engine: Engine,
    lines: Rows,
    shared: Options,
    sink: Sink,
    named: Mapping[str, int],
    file: Path | None,
    progress: Callable[[], AbstractContextManager[Progress]],
    on_resume: Callable[[int], None],
) -> Outcome:
    """Compute what the sink does not have yet, and finish it."""
    table = isinstance(sink, Journal) and sink.grows != sink.out
    zipped = isinstance(sink, Journal) and sink.out.suffix.lower() == ".gz"
    if isinstance(sink, Journal) and sink.resumed:
        _go_on(lines, sink, engine)
        on_resume(sink.mark.rows)
    engine.sources.pinned = True  # one run is of one state of the store
    check_adapters(engine, named, lines.name)
    with progress() as bar:
        total = 0 if file is None or file.suffix == ".gz" else max(0, file.stat().st_size - lines.offset)
        outcome = go(engine, lines, shared, sink, advance=bar("rows", total), pack=_zip if zipped else bytes)
    if isinstance(sink, Journal) and table:
        write_table(sink.grows, sink.out, source=file, into=shared.into)
    sink.finish()
    return outcome


def _zip(window: bytes) -> bytes:
    """A member of a gzip file, the same whenever it is made."""
    return gzip.compress(window, mtime=0)


def _check_places(source: Path | None, out: str | Path | BinaryIO, overwrite: bool) -> None:
    """Refuse an output that is the input, or that is there and finished: before the base is loaded."""
    if not isinstance(out, str | Path):
        return
    out = Path(out)
    is_table(out)
    if source is not None and out.exists() and out.samefile(source):
        raise UsageError(f"{out} is the input", path=out, hint="give another --out: the input is read while it runs")
    if not overwrite:
        refuse_finished(out)


def _given(options: Options, finder: AdapterFinder) -> dict[str, AdapterSource]:
    """Adapters by their names in the expression: those given, and the directories that it names itself, no row does."""
    sources = {ref: finder.source(ref) for ref in (parse(options.adapter).refs if options.adapter is not None else ())}
    for ref, source in sources.items():
        if isinstance(source, Artifact) and source.manifest.type == "router":
            _check_task(ref, source, options)
    return {**finder.given, **{ref: source for ref, source in sources.items() if isinstance(source, Path)}}


def _check_task(ref: str, router: Artifact, options: Options) -> None:
    """Refuse rows that name no task for a router that is asked for one, or name one for another router."""
    reads = SCORERS.get(router.manifest.method or "").reads_tasks
    if reads and options.task_column is None:
        raise UsageError(f"rows of {ref} name the member that answers", ref=ref, hint="--task-column COLUMN")
    if not reads and options.task_column is not None:
        raise UsageError(f"{NO_TASK}: {ref} chooses by itself", ref=ref, hint="leave --task-column out")


def _base_of(options: Options, finder: AdapterFinder) -> str:
    """The base that the first adapter of an expression was made for: by its fingerprint, where it was seen here.

    Of a directory without a manifest, what its config names.
    """
    if options.adapter is None:
        raise UsageError("nothing says which base the rows are for", hint="--base BASE")
    refs = parse(options.adapter).refs
    base = next((at_hand(m.base) for m in manifests_of(refs, finder) if m.base is not None), None)
    folders = [ref for ref in refs if isinstance(finder.source(ref), Path)]
    named = (finder.find(ref).config.get("base_model_name_or_path") for ref in folders)
    base = base or next((str(name) for name in named if name), None)
    if base is None:
        raise UsageError(f"{options.adapter} does not say which base it was made for", hint="--base BASE")
    return base


def _held(quantize: str | None, options: Options, finder: AdapterFinder) -> str:
    if quantize is not None or options.adapter is None:
        return quantize or "none"
    return held_as(None, manifests_of(parse(options.adapter).refs, finder))


def _engine(
    base: str,
    quantize: str,
    dtype: str,
    rows: int,
    resident: str,
    allow_base_drift: bool,
    *,
    device: str | None,
    adapters: Mapping[str, AdapterSource],
) -> Engine:
    on_cpu = not torch.cuda.is_available() if device is None else device.partition(":")[0] == "cpu"
    return Engine(
        base,
        adapters=adapters,
        device=device,
        quantize=quantize,
        dtype=("fp32" if on_cpu else None) if dtype == "auto" else dtype,
        rows=rows,
        resident=parse_size(resident),
        allow_base_drift=allow_base_drift,
    )


def _sink(
    out: str | Path | BinaryIO, engine: Engine, options: Options, overwrite: bool, given: Mapping[str, AdapterSource]
) -> Sink:
    if not isinstance(out, str | Path):
        return Stream(out)
    out = Path(out)
    host = engine.host
    settings = {
        "base": [host.name, host.identity.weights_fingerprint, host.held],
        "batch_size": engine.rows,
        "resident": engine.residency.budget,
        **{f"the content of {name}": _content(source) for name, source in given.items()},
        **asdict(options),
    }
    grows = out.with_name(out.name + ".rows") if is_table(out) else None
    return Journal(out, settings, overwrite=overwrite, grows=grows)


def _content(source: AdapterSource) -> str:
    """A ref as it is; of a directory a digest of all that is read of it: configurations and tensors."""
    directory = Path(str(getattr(source, "ref", source)))
    if not directory.is_dir():
        return str(directory)
    files = sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors") and p.is_file())
    return digest(dumps({path.name: sha256_file(path)[0] for path in files}))


def _go_on(lines: Rows, sink: Journal, engine: Engine) -> None:
    """Move the input to where an interrupted run was, and let refs mean what they meant then."""
    mark = sink.mark
    if not lines.skip(mark.offset, count=mark.rows, number=mark.lines) or (mark.offset and lines.sha256 != mark.sha256):
        raise UsageError(
            f"{lines.name} is not the input that {sink.out} was begun with",
            path=sink.path,
            hint="give the same input to go on, or --overwrite to begin anew",
        )
    engine.sources.pins.update(sink.pins)
