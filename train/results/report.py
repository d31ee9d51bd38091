"""What a run shows and leaves: the progress bar, metrics.jsonl, the curves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from html import escape
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from train.errors import TrainError

__all__ = ["Metrics", "new_progress", "plot_curves", "progress_bar", "write_page"]


class Metrics:
    """The records of a run, in memory and as lines of metrics.jsonl (rewritten when a run resumes).

    Raises
    ------
    TrainError
        The disk is full.
    """

    def __init__(
        self,
        folder: Path | None,
        history: list[dict[str, Any]],
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.history, self._watch = history, watch
        self._path = folder / "metrics.jsonl" if folder is not None else None
        self._stream: IO[str] | None = None

    def __enter__(self) -> Metrics:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("w", encoding="utf-8")
            self._stream.writelines(_line(record) for record in self.history)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError) if error is not None else self._writing():  # what is on its way up says more
                stream.close()

    def add(self, record: dict[str, Any]) -> None:
        """Keep one record; evaluations are written through at once."""
        self.history.append(record)
        if self._watch is not None:
            self._watch(record)
        if self._stream is not None:
            with self._writing():
                self._stream.write(_line(record))
            if "eval" in record:
                self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        if self._stream is not None:
            with self._writing():
                self._stream.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = f"cannot write {self._path}: {error.strerror}"
            raise TrainError(told, path=self._path, hint="make room and run again with --resume") from error


def _line(record: dict[str, Any]) -> str:
    """One line of JSON; what is not finite becomes null, which every reader of JSON knows."""
    values = {
        k: {m: _finite(v) for m, v in value.items()} if k == "eval" else _finite(value) for k, value in record.items()
    }
    return json.dumps(values) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_progress(console: Console, accelerator: Accelerator) -> Progress:
    """A display of steps, time left and status; silent unless the console is a terminal of the main process."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not (console.is_terminal and accelerator.is_main_process)
    return Progress(*columns, TextColumn("{task.fields[status]}"), console=console, disable=quiet)


@contextmanager
def progress_bar(progress: Progress | None, accelerator: Accelerator) -> Iterator[Callable[[int, int, str], None]]:
    """Yield `advance(done, total, status)`: a line of the given display, or of one on stderr if it is a terminal."""
    with ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(new_progress(Console(stderr=True), accelerator))
        task = progress.add_task("train", total=None, status="")
        stack.callback(progress.remove_task, task)
        yield partial(_advance, progress, task)


def _advance(progress: Progress, task: TaskID, done: int, total: int, status: str) -> None:
    progress.update(task, completed=done, total=total, status=status)


def plot_curves(history: Sequence[dict[str, Any]], path: Path, *, title: str = "") -> None:
    """Training loss (thin), its running mean, evaluation loss and the learning rate over steps, as an SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps = [(r["step"], r["loss"], r["lr"]) for r in history if "loss" in r]
    evals = [(r["step"], r["eval"]["loss"]) for r in history if "eval" in r]
    with mpl.rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        rate = axes.twinx()
        rate.plot([s for s, _, _ in steps], [lr for _, _, lr in steps], color="0.75", linewidth=1)
        rate.set_ylabel("learning rate", color="0.5")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.plot([s for s, _, _ in steps], [v for _, v, _ in steps], color="C0", alpha=0.35, linewidth=0.8)
        axes.plot([s for s, _, _ in steps], _smooth([v for _, v, _ in steps]), color="C0", label="training")
        if evals:
            axes.plot([s for s, _ in evals], [v for _, v in evals], "o-", color="C3", label="held out", markersize=3)
        axes.set(xlabel="step", ylabel="loss (nats per item)", title=title)
        axes.set_zorder(rate.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def write_page(folder: Path, history: Sequence[dict[str, Any]], *, title: str) -> None:
    """curves.html: the curves and a table of the evaluations, in one file that needs no other."""
    evals = [r for r in history if "eval" in r]
    names = list(dict.fromkeys(name for r in evals for name in r["eval"]))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("step", *names, "best so far"))
    rows = "".join(
        f"<tr><td>{r['step']}</td>"
        + "".join(f"<td>{r['eval'].get(name, math.nan):.4g}</td>" for name in names)
        + f"<td>{'yes' if r['best'] else ''}</td></tr>"
        for r in evals
    )
    svg = (folder / "curves.svg").read_text(encoding="utf-8")
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem}"
        "td,th{padding:.15rem .8rem;text-align:right}svg{width:100%;height:auto}</style>"
        f"<h1>{escape(title)}</h1>{svg[svg.index('<svg') :]}<table><tr>{head}</tr>{rows}</table></html>\n"
    )
    (folder / "curves.html").write_text(page, encoding="utf-8")


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the run around each step: it does not lag behind."""
    reach = len(values) // 40
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
