"""From the user's choice to domains; needs neither torch nor a model, so bad input is told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from train.quickstart import builtin, userfiles
from train.quickstart.corpus import Domain, split


def gather(paths: Mapping[str, Path], *, seed: int, say: Callable[[str], None]) -> list[Domain]:
    """Read and split the user's domains, or the four of every Python machine where none are given.

    Raises
    ------
    UsageError
        Text that is missing, empty, binary or too little; fewer than two domains.
    """
    if paths:
        found = {name: userfiles.read_domain(name, path, seed) for name, path in paths.items()}
    else:
        found = builtin.builtin(seed)
    domains = split(found, seed=seed)
    for domain in domains:
        size = sum(len(document.text) for document in domain.train) / 1000
        left = f"; left out: {', '.join(domain.left_out)}" if domain.left_out else ""
        say(
            f"{domain.name}: {len(domain.train)} documents to train on ({size:,.0f} thousand characters), "
            f"{len(domain.heldout)} held out{left}"
        )
    return domains
