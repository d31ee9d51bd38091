"""Few-shot classifiers: a task, its splits, a run; and classifiers out of the store.

>>> classifier = load("acme/stars")
>>> classifier.predict(["Not a dull moment."]), classifier.predict_proba(["Not a dull moment."])
"""

from typing import TYPE_CHECKING

from hub.lazy import face

if TYPE_CHECKING:
    from train.fewshot.classifier.classifier import FewShotClassifier as FewShotClassifier
    from train.fewshot.classifier.classifier import load as load
    from train.fewshot.examples import Columns as Columns
    from train.fewshot.examples import Example as Example
    from train.fewshot.prompts.show import show as show
    from train.fewshot.run import Request as Request

_HOMES = {
    "train.fewshot.classifier.classifier": ("FewShotClassifier", "load"),
    "train.fewshot.examples": ("Columns", "Example"),
    "train.fewshot.prompts.show": ("show",),
    "train.fewshot.run": ("Request",),
}

__all__, __getattr__, __dir__ = face(__name__, _HOMES)
