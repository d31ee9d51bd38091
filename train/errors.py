"""What can go wrong while an adapter is made; every error names the thing, the place and the next command."""

from __future__ import annotations

from hub.errors import HubError, UsageError
from train.result import FitResult

__all__ = ["ConfigError", "DataError", "NonFiniteLoss", "TrainError"]


class TrainError(HubError):
    """Training cannot start or cannot go on."""


class ConfigError(UsageError):
    """A run's configuration has an unknown key or an impossible value."""


class DataError(TrainError):
    """The data are missing, unreadable, or would train nothing."""


class NonFiniteLoss(TrainError):
    """The loss or the gradient became NaN or infinite; the best adapter so far is back in place.

    Attributes
    ----------
    result : FitResult
        History up to the bad step, and the best evaluation if there was one.
    """

    def __init__(self, message: str, *, result: FitResult, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.result = result
