"""What a validation gives back."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ladezeit.errors import LoadError

#: A reason names this many findings; the rest is counted.
NAMED_IN_REASON = 10

META = "has no data: it is on the meta device"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as asked.

    `kind` is one of ``meta``, ``device``, ``dtype``, ``quantisation``, ``tie``, ``offload``, ``generation_config``,
    ``missing_key``, ``mismatched_key``, ``unexpected_key``; of level ``content`` also ``content``, ``shape``,
    ``missing``, ``unexpected``; of level ``logits`` ``logits`` and ``tokens``. `name` is the tensor's or module's,
    empty for the whole model.
    """

    kind: str
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.detail}" if self.name else f"{self.kind}: {self.detail}"


@dataclass
class LevelReport:
    """What one level looked at and found; `summary` says what that means, or why it did not run.

    `guarantee` says in one sentence what that shows and what it does not, where a level's name does not say it already.

    `tensors_seen` counts looks: a level that looks at a tensor five times counts five. `metrics` are what the level
    measured besides, by the names that the result file gives them.
    """

    summary: str
    ran: bool = True
    modules_seen: int = 0
    tensors_seen: int = 0
    findings: list[Finding] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    guarantee: str | None = None

    def describe_reason(self) -> str:
        """Return one line: the claim, or the first findings and how many more there are."""
        if not self.findings:
            return self.summary
        named = "; ".join(str(finding) for finding in self.findings[:NAMED_IN_REASON])
        more = len(self.findings) - NAMED_IN_REASON
        return named + (f"; and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Verification:
    """What a validation level looked at, what it found and what it cost.

    `passed` is True only where the level ran and found nothing: one that did not run verifies nothing. `claim` is one
    sentence for reports, where the level alone would be misread: what of a quantized or split model is verified; None
    where the level says it all, or nothing is verified.
    """

    level: str
    passed: bool
    ran: bool
    reason: str
    modules_seen: int
    tensors_seen: int
    findings: list[Finding] = field(default_factory=list)
    total_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    claim: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for the result file, whose metrics have a place of their own."""
        plain = asdict(self)
        del plain["metrics"]
        return plain


class ValidationError(LoadError):
    """A model was loaded and did not pass; `findings` are all that was found, `verification` is the whole of it."""

    def __init__(self, message: str, verification: "Verification") -> None:
        super().__init__(message)
        self.verification = verification

    @property
    def findings(self) -> "list[Finding]":
        """What is not as asked, one entry a tensor or module."""
        return self.verification.findings
