"""Every error compose raises beside those of the hub: each names the node, the adapter or the site at fault."""

from __future__ import annotations

from hub.errors import HubError, HubWarning, NotFound, UsageError


class ExpressionError(UsageError):
    """An expression that cannot be read or is not allowed. Read from text, the message shows the place."""


class CallError(ExpressionError):
    """A call of an unknown function, or with wrong arguments; ``option`` names the option at fault, or is empty."""

    def __init__(self, message: str, *, option: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option


class PlanError(HubError):
    """A composition that cannot be carried out; the message names the node by its text."""


class CompositionCycle(HubError):
    """A composition that contains itself."""


class MissingRequirement(NotFound):
    """What a composition requires is not in the store."""


class KindError(HubError):
    """An unknown kind or option, a config the base cannot carry, or tensors that do not fit."""


class SiteBypassed(KindError):
    """An active adapter acts at layers that this model never calls: it did nothing there."""


class IdleWarning(UserWarning):
    """Layers at which an active adapter acts did not run in a call."""


class MergeWarning(HubWarning):
    """A merge was written with a limited rank that nobody asked for; the message says what that lost."""


class SiteError(HubError):
    """No site matches what was asked for, or the base has none."""


class PatternError(HubError):
    """A pattern that is no regular expression, or takes too long."""
