"""The card of a trained adapter: README.md with the facts of its manifest, for people and for model hubs."""

from __future__ import annotations

from pathlib import Path

import yaml

from hub.manifest import Draft

__all__ = ["write_card"]


def write_card(path: Path, draft: Draft, *, trainable: int) -> None:
    """Write the card; equal facts give equal bytes."""
    path.write_text(card(draft, trainable=trainable), encoding="utf-8")


def card(draft: Draft, *, trainable: int) -> str:
    """Markdown with a YAML header in the form model hubs read."""
    parts = [_header(draft), f"# {draft.name} {draft.version}", draft.summary or _summary(draft)]
    parts += ["## Use", _use(draft)]
    if draft.metrics:
        parts += ["## Measured", _measured(draft)]
    parts += ["## How it was made", _made(draft, trainable)]
    return "\n\n".join(parts) + "\n"


def _header(draft: Draft) -> str:
    repo = draft.base.repo if draft.base else ""
    facts = {
        "library_name": "moduloom",
        "base_model": repo if "/" in repo else None,  # hubs link it: only where it is a name they know
        "license": draft.license,
        "tags": ["adapter", draft.kind, *([draft.task] if draft.task else []), *draft.domains],
        "language": list(draft.languages) or None,
    }
    text = yaml.safe_dump({k: v for k, v in facts.items() if v is not None}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _summary(draft: Draft) -> str:
    learned = f", learned by {draft.method}" if draft.method not in ("", draft.kind) else ""
    repo = draft.base.repo if draft.base else "its base"
    task = f" for {draft.task.replace('_', ' ')}" if draft.task else ""
    return f"A {draft.kind} adapter of `{repo}`{task}{learned}."


def _use(draft: Draft) -> str:
    repo = draft.base.repo if draft.base else "BASE"
    if draft.reader is not None:
        return (
            "```python\nfrom train import fewshot\n\n"
            f'classifier = fewshot.load("{draft.ref}")\nclassifier.predict(["a text"])\n```\n\n'
            f"`hub run FILE --expr {draft.ref}` adds answers to rows; `hub serve` gives them by `/v1/classify`."
        )
    return (
        "```python\nimport compose\n\n"
        f'model = compose.load("{repo}", "{draft.ref}")\n'
        f'tokenizer = compose.tokenizer("{repo}")\n```'
    )


def _measured(draft: Draft) -> str:
    lines = ["| measure | value | on | n | seeds |", "|---|---|---|---|---|"]
    for m in draft.metrics:
        value = f"{m.value:.4f}" + (f" ± {m.sd:.4f}" if m.sd is not None else "")
        seeds = ", ".join(str(seed) for seed in m.seeds)
        lines.append(f"| {m.metric} | {value} | {m.dataset} ({m.split}) | {m.n} | {seeds} |")
    return "\n".join(lines)


def _made(draft: Draft, trainable: int) -> str:
    rows: dict[str, object] = {"trained parameters": f"{trainable:,}", "sites": len(draft.placement)}
    if draft.labels:
        rows["labels"] = ", ".join(draft.labels)
    if draft.trained_on:
        rows["base held as"] = draft.trained_on.quantization
        rows["arithmetic"] = draft.trained_on.compute_dtype
        rows["libraries"] = ", ".join(f"{name} {found}" for name, found in draft.trained_on.libraries.items())
    for group in ("adapter", "training"):
        values = draft.hyperparameters.get(group)
        rows |= {f"{group}: {name}": value for name, value in values.items()} if isinstance(values, dict) else {}
    rows |= {name: draft.hyperparameters[name] for name in ("steps", "items") if name in draft.hyperparameters}
    if draft.lineage:
        rows |= {f"data: {name}": f"`{digest}`" for name, digest in draft.lineage.data.items()}
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| fact | value |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
