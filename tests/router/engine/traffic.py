"""Rows of every kind over one small base, and a hand to take an engine's steps one by one."""

from __future__ import annotations

from time import monotonic

from router.engine.admission import Admission
from router.engine.batches.running_row import RunningRow
from router.engine.engine import Engine
from router.engine.job import Answer, Job
from router.engine.request import Request
from router.engine.work import Work

KINDS = {
    "lora": {"r": 2},
    "dora": {"r": 2},
    "ia3": {},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 4},
    "prompt-long": {"num_virtual_tokens": 9},
    "bottleneck": {},
}
SINGLE = (*KINDS, None, "0.5 * lora + dora", "prompt + lora", "ties(lora, lora)")
ENSEMBLES = (
    "ensemble.demix(lora, dora)",
    "ensemble.mean(prompt, ia3, lora)",
    "ensemble.demix(lora, prefix)",
)
ROUTERS = ("local/arrow", "local/near")
HEADS = ("mood", "topic")


def publish_all(published) -> None:
    """Adapters of all kinds, two with heads, and two routers over some of them."""
    for seed, (name, options) in enumerate(KINDS.items()):
        published.publish(name, name.partition("-")[0], seed=seed + 1, options=options)
    published.publish("mood", seed=21, labels=("bad", "good"))
    published.publish("topic", "ia3", seed=22, labels=("art", "sport", "war"))
    published.route("arrow", "arrow", ("lora", "second"))
    published.route("centroid", "near", ("lora", "second"))


class Steps:
    """An engine whose steps are taken by hand: no thread, no clock."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.work = engine, Work(engine.host, lambda _rows: None)
        bounds = {"rows": engine.rows, "tokens": engine.tokens}
        self.admission = Admission(engine.host, engine.sources, engine.residency, self.work, **bounds)
        self.waiting: list[Job] = []
        self.answers: dict[int, Answer] = {}

    def submit(self, request: Request) -> Job:
        row = RunningRow(self.engine.prepare(request), self.engine.host.tokenizer)
        job = Job(row, lambda _answer: None, monotonic())
        self.waiting.append(job)
        return job

    def turn(self) -> None:
        """What the engine's thread does in a turn."""
        for job in self.work.sweep():
            self.admission.release(job)
        for job, error in self.admission.admit(self.waiting):
            assert error is None
            self.waiting.remove(job)
        self.work.turn()
        self.work.ended()

    def until(self, job: Job, most: int = 10_000) -> int:
        """Turns until a row has ended."""
        begun = self.work.steps
        while not job.row.over:
            self.turn()
            assert self.work.steps - begun <= most, f"not over after {most} steps"
        return self.work.steps - begun
