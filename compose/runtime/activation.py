"""What an activation has done beside making a composition active: the merges in it, with what each has lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compose.parameter_space.certificate import Certificate


@dataclass(frozen=True)
class Activation:
    """The merges that were carried out for a composition, those among their members too, by their texts.

    A merge that is a weighted sum of its members is not among them: it runs as that sum, which is exact.
    """

    certificates: Mapping[str, Certificate] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether every merge is active as it is defined."""
        return all(certificate.exact for certificate in self.certificates.values())

    def __str__(self) -> str:
        lossy = (f"{text}: {certificate}" for text, certificate in self.certificates.items() if not certificate.exact)
        return "exact" if self.exact else "; ".join(lossy)
