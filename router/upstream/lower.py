"""A process of its own that writes one plain LoRA: ``python -m router.upstream.lower < job.json``.

The base is loaded here and gone with the process, so an engine's own process never holds it twice. The last line on
stdout is JSON: what was written, or the error.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from compose.errors import KindError, MergeWarning
from hub.errors import HubError

EXACT = 1e-10  # a share of the energy below this is the rounding of float32


def main() -> int:
    """Read a job from stdin, carry it out, and print what came of it."""
    job = json.loads(sys.stdin.read())
    try:
        done = write(**{**job, "out": Path(job["out"])})
    except HubError as error:
        done = error.as_dict()
    print(json.dumps(done))  # noqa: T201 - the answer to whoever started this process
    return 0


def write(
    expression: str, shown: str, base: str, out: Path, rank: int, max_discarded: float, lora: bool
) -> dict[str, Any]:
    """Write an expression over the store as one plain LoRA of at most ``rank``.

    Parameters
    ----------
    expression, shown
        Over digests; what messages call it.
    base
        Directory of the base.
    out
        An empty directory.
    max_discarded
        Share of the energy that may be left out.
    lora
        It is one artifact that is a LoRA: then its own factors are written, and the base is not read.

    Raises
    ------
    KindError
        It is no change of weights, or loses more than ``max_discarded`` at this rank.
    """
    from compose.export_formats.vllm import fit

    if lora:
        from compose.artifacts.exporting import export

        export(expression, "vllm", out, base=base)
        own = int(json.loads((out / "adapter_config.json").read_text("utf-8"))["r"])
        if own <= rank:
            return {"rank": own, "discarded": 0.0, "certificate": "exact"}
        for file in out.iterdir():
            file.unlink()
    discarded, certificate = _lower(expression, shown, base, out, rank)
    if discarded > max(max_discarded, EXACT):
        raise KindError(
            f"{shown} is no LoRA of rank {rank}, the most this server takes: written as one, {certificate}; "
            f"at most {max_discarded:.3g} may be left out",
            hint="start it with a larger --max-lora-rank, or allow a share: MODULOOM_VLLM_MAX_DISCARDED=0.01",
        )
    return {"rank": fit(out)[0], "discarded": discarded, "certificate": certificate}


def _lower(expression: str, shown: str, base: str, out: Path, rank: int) -> tuple[float, str]:
    """Write the LoRA nearest to an expression; the share left out, and the certificate in words."""
    from compose.api import load
    from compose.export_formats.vllm import write_lowered

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", MergeWarning)
        model = load(base, expression, dtype="fp32", device="cpu")
        merged = write_lowered(model, out, what=shown, rank=rank)
    shares = [merged.certificate.share]
    if any(issubclass(warning.category, MergeWarning) for warning in told):  # a merge inside was cut, unasked
        shares += [inner.share for inner in merged.inner.values()]
    return max(shares), str(merged.certificate)


if __name__ == "__main__":
    sys.exit(main())
