"""New adapters: data, one training loop, evaluation, and publishing what was learned as an artifact.

>>> outcome = run({"data": {"train": "reviews.jsonl", "eval": 0.1}, "task": "classification"}, ref="acme/reviews")
>>> evaluate("acme/reviews", "test.jsonl")["measures"]
>>> few_shot("few.jsonl", "BASE", publish="acme/stars")
>>> fewshot.load("acme/stars").predict(["Not a dull moment."])
"""

from typing import TYPE_CHECKING

from hub.lazy import face
from train import fewshot as fewshot

if TYPE_CHECKING:
    from train.assess import evaluate as evaluate
    from train.config import TrainConfig as TrainConfig
    from train.config import load_config as load_config
    from train.data.datasets import text_blocks as text_blocks
    from train.data.files import read_rows as read_rows
    from train.dry_run import preview as preview
    from train.fewshot.api import few_shot as few_shot
    from train.loop import fit as fit
    from train.many import Job as Job
    from train.many import fit_many as fit_many
    from train.method import Method as Method
    from train.methods_table import describe_methods as describe_methods
    from train.pipeline import Outcome as Outcome
    from train.pipeline import prepare as prepare
    from train.pipeline import run as run
    from train.result import FitResult as FitResult
    from train.steps.evaluate import perplexity as perplexity
    from train.successive_halving import race as race

    __version__: str

_HOMES = {
    "train.assess": ("evaluate",),
    "train.config": ("TrainConfig", "load_config"),
    "train.data.datasets": ("text_blocks",),
    "train.data.files": ("read_rows",),
    "train.dry_run": ("preview",),
    "train.fewshot.api": ("few_shot",),
    "train.loop": ("fit",),
    "train.many": ("Job", "fit_many"),
    "train.method": ("Method",),
    "train.methods_table": ("describe_methods",),
    "train.pipeline": ("Outcome", "prepare", "run"),
    "train.result": ("FitResult",),
    "train.steps.evaluate": ("perplexity",),
    "train.successive_halving": ("race",),
}

__all__, __getattr__, __dir__ = face(__name__, _HOMES)
