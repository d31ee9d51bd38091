"""The public functions of router: routers made of a store's adapters, measured and looked into; `hub route` calls them.

>>> fit(["acme/law", "acme/code"], "discriminant", "acme/near@1.0.0", data={"law": "l.jsonl", "code": "c.jsonl"})
>>> evaluate("acme/near", {"law": "test-law.jsonl"}).rows
>>> explain("acme/near", "The parties agree").best
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

import compose
from compose.base.at_hand import at_hand
from compose.base.texts import Text, encode, read_texts
from compose.expr.tokens import IDENTITY_WORD
from compose.expr.tree import IDENTITY, Ref
from compose.planning.held import held_as
from compose.planning.members import AdapterFinder, StoredAdapter, manifest_of
from compose.runtime.model_runtime import runtime
from compose.slots.gate import refuse_outside
from hub.console.progress import Steps
from hub.errors import Conflict, NotFound, UsageError, suggest
from hub.relations.word_counts import count_words, read_words
from hub.store import Artifact, Store
from router.artifact import adapters_of, load, members_of, publish, refuse_heads
from router.bench import Batch, Bench, refuse_missing
from router.ensemble.demix import Ensemble
from router.evaluation.measure import PROMPT, LabelledRows, Report, accuracies, perplexities
from router.router import Router, within
from router.scorer import make_scorer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Texts: TypeAlias = str | Path | Sequence[str]  # a file of rows, or the texts themselves


class OnBase(TypedDict, total=False):
    """Keywords of `on_base`."""

    base: str | None
    quantize: str | None
    allow_base_drift: bool


def fit(
    members: Sequence[str],
    method: str,
    ref: str,
    *,
    data: Mapping[str, Texts] | None = None,
    options: Mapping[str, Any] | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    max_rows: int = 500,
    max_length: int = 256,
    license: str | None = None,
    summary: str = "",
    store: Store | None = None,
    progress: Steps | None = None,
    **base: Unpack[OnBase],
) -> Artifact:
    """Fit a router on adapters and their texts, and publish it under `ref`.

    Parameters
    ----------
    members
        Refs, or ``name=ref``; a member is called by the last part of its ref where no name is given. ``identity`` is
        the bare base.
    data
        Texts that a member was made for, by its name: at most `max_rows` of `max_length` tokens are read.
    options, top_k, threshold, temperature
        Of the method (`router.scorer`) and of the gating (`router.gating.gate`); None is the method's own.
    base
        ``base``, ``quantize`` and ``allow_base_drift``: see `on_base`.

    Raises
    ------
    HubError
        An unknown method, option or member, members of different bases, a member without text where the method needs
        some; nothing is published then.
    """
    finder = AdapterFinder(store)
    scorer = make_scorer(method, options)  # what is wrong here is told before any work
    pool = members_of(members, finder)
    refuse_heads(scorer, {name: m.manifest for name, m in adapters_of(pool).items() if m.manifest is not None})
    asked = {"top_k": top_k, "threshold": threshold, "temperature": temperature}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    gating = replace(within(scorer.gating, len(pool)), **given).check(len(pool))
    texts = _texts(data or {}, pool, max_rows)
    if scorer.needs_data:
        refuse_missing(pool, texts)
    bench = _bench(pool, texts, max_length, seed, progress, base)
    if scorer.level == "site":
        for adapter in runtime(bench.model).adapters.values():
            refuse_outside(adapter)
    router = Router(scorer, bench.experts, scorer.fit(bench), gating)
    words = {name: count_words(rows) for name, rows in texts.items()}
    return publish(router, pool, ref, finder, words=words, license=license, summary=summary)


def add(
    router: str,
    adapter: str,
    ref: str,
    *,
    data: Mapping[str, Texts] | None = None,
    seed: int = 0,
    max_rows: int = 500,
    max_length: int = 256,
    store: Store | None = None,
    progress: Steps | None = None,
    **base: Unpack[OnBase],
) -> Artifact:
    """Publish a router with one more adapter under `ref`: only the new one is measured, the others stay as they are.

    See `fit`; raises Conflict for a name that is taken, UsageError for a method that learns its experts together.
    """
    finder = AdapterFinder(store)
    stored = load(router, finder.store)
    known = {name: f"{artifact.ref.id}@{artifact.digest}" for name, artifact in stored.artifacts.items()}
    old = [f"{name}={known.get(name, IDENTITY_WORD)}" for name in stored.router.experts]
    name, new = next(iter(members_of([adapter], finder).items()))
    if name in stored.router.experts:
        raise Conflict(f"{router} has a member {name!r} already", hint=f"give it another name: other={adapter}")
    pool = members_of([*old, f"{name}={new.text if new else IDENTITY_WORD}"], finder)
    texts = _texts(data or {}, {name: new}, max_rows)
    grown = stored.router.add(name, _bench({name: new}, texts, max_length, seed, progress, base))
    counts = read_words(finder.store.get(router))
    words = {n: counts[str(stored.digest)] for n, stored in adapters_of(pool).items() if str(stored.digest) in counts}
    words |= {n: count_words(rows) for n, rows in texts.items()}
    kept = stored.manifest.requires if stored.manifest is not None else ()
    return publish(grown, pool, ref, finder, words=words, kept=kept)


def evaluate(
    router: str,
    sets: Mapping[str, str | Path | Sequence[Text]],
    *,
    dev: Mapping[str, str | Path | Sequence[Text]] | None = None,
    prompts: Sequence[int] = (),
    max_rows: int = 500,
    max_length: int = 256,
    store: Store | None = None,
    progress: Steps | None = None,
    **base: Unpack[OnBase],
) -> Report:
    """Measure a router on named sets of rows beside base, best single, average and oracle.

    Perplexity of what follows the first tokens of a text, as many as `prompts` says (32), or accuracy where the members
    classify; rows of `dev` are what a likelihood router's mixture on the set of their name takes its prior from. See
    `router.evaluation.measure`.

    Raises
    ------
    HubError
        No such router, a set without rows or labels, members of which some classify and some do not.
    """
    rows = {name: _rows(source, max_rows) for name, source in sets.items()}
    more = {name: _rows(source, max_rows) for name, source in (dev or {}).items()}
    stored = load(router, store)
    if more and stored.router.scorer.name != "likelihood":
        raise UsageError(f"{router} is a {stored.router.scorer.name} router and has no prior", hint="leave --dev out")
    if wrong := [name for name in more if name not in rows]:
        raise UsageError(f"--dev has rows for {wrong[0]!r}, and --data none", hint=suggest(wrong[0], rows))
    if stored.router.scorer.reads_tasks and (wrong := [name for name in rows if name not in stored.router.experts]):
        hint = suggest(wrong[0], stored.router.experts) or "members: " + ", ".join(stored.router.experts)
        raise UsageError(f"rows of {router} ask for a member, and {wrong[0]!r} is none", hint=hint)
    tasks = {artifact.manifest.task or "causal_lm" for artifact in stored.artifacts.values()}
    if prompts and tasks == {"classification"}:
        raise UsageError(
            "the members classify, and a row is read whole before one is chosen", hint="no --prompt-tokens"
        )
    if tasks not in ({"causal_lm"}, {"classification"}):
        raise UsageError(
            f"the members are for {' and '.join(sorted(tasks))}: neither perplexity nor accuracy is theirs"
        )
    model, tokenizer = on_base(stored.artifacts, **base)
    pad = tokenizer.pad_token_id or 0
    if tasks == {"causal_lm"}:
        encoded, held_out = (
            {name: encode(tokenizer, [row.text for row in texts], most=max_length) for name, texts in files.items()}
            for files in (rows, more)
        )
        lengths = tuple(dict.fromkeys(prompts)) or (PROMPT,)
        return perplexities(stored.router, model, encoded, prompts=lengths, dev=held_out, pad=pad, progress=progress)
    labelled = {name: _labelled(name, texts, tokenizer, max_length) for name, texts in rows.items()}
    classes = {name: artifact.manifest.labels for name, artifact in stored.artifacts.items()}
    return accuracies(stored.router, model, labelled, classes, pad=pad, progress=progress)


@dataclass(frozen=True)
class Explanation:
    """Which experts answer which tokens.

    Attributes
    ----------
    tokens : their text.
    experts : names of the router's members.
    weights : (T, E).
    """

    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    weights: Tensor

    @property
    def best(self) -> tuple[str, ...]:
        """The expert that weighs most for each token."""
        return tuple(self.experts[e] for e in self.weights.argmax(-1).tolist())


def explain(
    router: str,
    text: str,
    *,
    task: str | None = None,
    max_length: int = 256,
    store: Store | None = None,
    **base: Unpack[OnBase],
) -> Explanation:
    """Weights of a router's members for each token of a text.

    Means over the sites for routers that choose at each site, and those of the whole row for routers that choose by
    row; of a likelihood router they are its posterior as the text is read. `task` is the member that the text asks for,
    where the router needs that.
    """
    stored = load(router, store)
    stored.router.check_task(task)
    model, tokenizer = on_base(stored.artifacts, **base)
    rows = encode(tokenizer, [text], most=max_length)
    if not rows:
        raise UsageError("the text has fewer than two tokens", hint="give a longer one")
    batch = Batch.of(rows, tasks=(task,) if task else ()).to(model.device)
    pieces = tuple(tokenizer.decode([token]) for token in rows[0].tolist())
    if stored.router.scorer.name == "likelihood":
        weights = _posterior(stored.router, model, batch)
    else:
        weights = stored.router.token_weights(model, batch)[0]
    return Explanation(pieces, tuple(stored.router.experts), weights.float().cpu())


def on_base(
    members: Mapping[str, Artifact | Path],
    *,
    base: str | None = None,
    quantize: str | None = None,
    allow_base_drift: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """The base with artifacts, or packed directories, resident under their names, frozen, and its tokenizer.

    Parameters
    ----------
    base
        See `compose.load`; None is the base that the members were made for.
    quantize
        None is as the members were trained, which is said on stderr.
    allow_base_drift
        Accept adapters trained on other weights of the same architecture.
    """
    facts = [manifest for where in members.values() if (manifest := manifest_of(where)) is not None]
    base = base or next((at_hand(m.base) for m in facts if m.base is not None), None)
    if base is None:
        raise UsageError("nothing says which base the members were made for", hint="--base BASE")
    tasks = {m.task for m in facts if m.task}
    task = tasks.pop() if len(tasks) == 1 else None
    labels = (facts[0].labels or None) if task == "classification" else None
    model = compose.load(base, quantize=held_as(quantize, facts), task=task, labels=labels)
    for name, artifact in members.items():
        compose.attach(model, name, artifact, allow_base_drift=allow_base_drift).freeze()
    return model, compose.tokenizer(base)


def _bench(
    members: Mapping[str, StoredAdapter | None],
    texts: Mapping[str, Sequence[str]],
    max_length: int,
    seed: int,
    progress: Steps | None,
    base: OnBase,
) -> Bench:
    artifacts = {name: stored.where for name, stored in adapters_of(members).items()}
    model, tokenizer = on_base(artifacts, **base)
    rows = {name: encode(tokenizer, own, most=max_length) for name, own in texts.items()}
    experts = {name: Ref(name) if stored else IDENTITY for name, stored in members.items()}
    return Bench(model, experts, rows, pad=tokenizer.pad_token_id or 0, seed=seed, progress=progress)


def _texts(data: Mapping[str, Texts], members: Mapping[str, Any], most: int) -> dict[str, list[str]]:
    """Texts by member; a name that is no member is an error."""
    for name in data:
        if name not in members:
            hint = suggest(name, members) or "members: " + ", ".join(members)
            raise NotFound(f"--data gives texts for {name!r}, which is no member", hint=hint)
    return {
        name: [row.text for row in read_texts(source, most=most)] if isinstance(source, str | Path) else list(source)
        for name, source in data.items()
    }


def _rows(source: str | Path | Sequence[Text], most: int) -> list[Text]:
    return read_texts(source, most=most) if isinstance(source, str | Path) else list(source)[:most]


def _labelled(name: str, rows: Sequence[Text], tokenizer: Any, most: int) -> LabelledRows:
    if bare := [i for i, row in enumerate(rows, 1) if row.label is None]:
        raise UsageError(f"row {bare[0]} of {name!r} has no label", hint='rows are {"text": "...", "label": "..."}')
    encoded = [encode(tokenizer, [row.text], most=most) for row in rows]
    kept = [(ids[0], str(row.label)) for ids, row in zip(encoded, rows, strict=True) if ids]
    return LabelledRows([ids for ids, _ in kept], [label for _, label in kept])


def _posterior(router: Router, model: PreTrainedModel, batch: Batch) -> Tensor:
    """The posterior after each token (T, E): before the first one it is the prior."""
    options = router.scorer.options
    ensemble = Ensemble(
        model,
        list(router.experts.values()),
        gamma=options.gamma,
        temperature=router.gating.temperature,
        hedge=options.hedge,
    )
    score = ensemble.score(batch.input_ids, batch.attention_mask)
    return torch.cat([score.posterior[0], score.final])
