"""Merging in parameter space: from an expression to one new adapter.

>>> merged = merge(model, "ties(a, b, density=0.2)", name="both")
>>> print(merged.certificate)                        # what a limited rank has lost, site by site
>>> compose.attach(model, "both", merged.adapter)

The methods are files under ``compose/merges/``; ``compose.parameter_space`` carries them out, and does so as well for a
merge inside an expression that is activated.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from compose.algebra import parse
from compose.expr.tree import Call, Expr
from compose.merging.measure import Data, Measurements
from compose.parameter_space import deltas
from compose.parameter_space.execute import Merged, Workspace, carry_out, execute, labels_of, make_job, without_merges
from compose.parameter_space.job import Job, Statistics
from compose.parameter_space.statistic import Statistic
from compose.runtime.model_runtime import runtime
from hub.console.progress import Steps


def merge(
    model: PreTrainedModel,
    expr: Expr | str,
    *,
    name: str = "merged",
    progress: Steps | None = None,
    data: Data | None = None,
) -> Merged:
    """Fold an expression over resident adapters into one new adapter.

    Parameters
    ----------
    expr
        A merge such as ``ties(a, b)``, or a sum, which is written as one adapter exactly where its kind allows.
    name
        Of the new adapter. A result of a higher rank than its members' is a dense delta, unless a rank is asked for
        (``rank=8``) or it does not fit (``compose.parameter_space.deltas.DENSE_BUDGET``): see the certificate.
    progress
        Called with what is done, how many places are done, and how many there are.
    data
        For a merge that measures something (regmean, fisher): batches, each the arguments of a forward call, or the
        batches of each argument of the merge by its text. Batches hold labels where a loss is differentiated.

    Raises
    ------
    KindError
        Names the merge and the adapter or site it is not defined for; nothing is changed then.
    """
    workspace = _workspace(model, progress, data)
    tree = parse(expr) if isinstance(expr, str) else expr
    if isinstance(tree, Call):
        return carry_out(workspace, tree, name, progress)
    whole = Call("cat", [without_merges(workspace, tree)])
    return replace(execute(workspace, whole, name, str(tree), progress), inner=dict(workspace.certificates))


def lower_to_lora(
    model: PreTrainedModel,
    expr: Expr | str,
    *,
    rank: int | None = None,
    name: str = "lowered",
    progress: Steps | None = None,
    data: Data | None = None,
) -> Merged:
    """One plain LoRA that does what a static expression of mixed kinds does, for engines that take nothing else.

    Every site's whole change D (gains, sequences and deltas of lora, dora, ia3, ... together) is approximated at
    ``rank`` by its singular value decomposition; the certificate says what each site lost. Sums of LoRAs need no rank:
    they are exact.

    Raises
    ------
    KindError
        An adapter that is no change of weights (bottleneck, prefix, prompt), a bias that moves, or no rank.
    """
    workspace = _workspace(model, progress, data)
    tree = parse(expr) if isinstance(expr, str) else expr
    call = Call("svd", [without_merges(workspace, tree)], {} if rank is None else {"rank": rank})
    job = make_job(workspace, call, name, f"lower_to_lora({tree})", progress)
    for adapter in job.adapters:
        if not adapter.averages_in_weight:
            raise job.refuse(f"{adapter.kind} {adapter.name!r} is no change of weights, so no LoRA does what it does")
    merged = Merged(*deltas.merge_to_lora(job), inner=dict(workspace.certificates))
    merged.adapter.labels = labels_of(job)
    return merged


def _workspace(model: PreTrainedModel, progress: Steps | None, data: Data | None) -> Workspace:
    home = runtime(model)

    def measure(job: Job, statistic: type[Statistic]) -> Statistics:
        return Measurements(home, statistic, job.members, job.paths, data or [], progress).at

    return Workspace(home, None if data is None else measure)
