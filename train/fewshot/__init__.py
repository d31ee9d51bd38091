"""Few-shot classifiers: a task, its splits, a run; and classifiers out of the store.

>>> classifier = fit([("Not a dull moment.", "good"), ("I left early.", "bad"), ...], "./bert", publish="acme/stars")
>>> classifier = load("acme/stars")
>>> classifier.predict(["Not a dull moment."]), classifier.predict_proba(["Not a dull moment."])
"""

from typing import TYPE_CHECKING

from hub.lazy import face

if TYPE_CHECKING:
    from train.fewshot.api import fit as fit
    from train.fewshot.api import more as more
    from train.fewshot.api import start as start
    from train.fewshot.classifier.asking import ask as ask
    from train.fewshot.classifier.classifier import FewShotClassifier as FewShotClassifier
    from train.fewshot.classifier.classifier import load as load
    from train.fewshot.classifier.files import answer_file as answer_file
    from train.fewshot.examples import Columns as Columns
    from train.fewshot.examples import Example as Example
    from train.fewshot.prompts.show import show as show
    from train.fewshot.run import Request as Request

_HOMES = {
    "train.fewshot.api": ("fit", "more", "start"),
    "train.fewshot.classifier.asking": ("ask",),
    "train.fewshot.classifier.classifier": ("FewShotClassifier", "load"),
    "train.fewshot.classifier.files": ("answer_file",),
    "train.fewshot.examples": ("Columns", "Example"),
    "train.fewshot.prompts.show": ("show",),
    "train.fewshot.run": ("Request",),
}

__all__, __getattr__, __dir__ = face(__name__, _HOMES)
