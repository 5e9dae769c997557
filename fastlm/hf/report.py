"""What :func:`fastlm.optimize` did to a model, as an object and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KINDS = ("attention", "loss", "norm", "rope", "mlp")


@dataclass(frozen=True)
class Row:
    """One kind of layer.

    Attributes:
        kind: ``"attention"``, ``"loss"``, ``"norm"``, ``"rope"`` or ``"mlp"``.
        replaced: How many of them are ours now.
        found: How many there are.
        op: The function that computes them.
        backend: Which backend that has on the model's device, or None where nothing was replaced.
        error: Largest difference from the model's own result in float64, as a share of the largest
            value; None where nothing was compared.
        reasons: Why the others are not, and how many for each reason.
    """

    kind: str
    replaced: int
    found: int
    op: str
    backend: str | None = None
    error: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was replaced and what was not, and why.

    Attributes:
        model: Name of the model's class.
        rows: One for each kind that was asked for.
    """

    model: str
    rows: tuple[Row, ...]

    @property
    def replaced(self) -> dict[str, int]:
        """How many layers of each kind are ours now."""
        return {row.kind: row.replaced for row in self.rows}

    def __getitem__(self, kind: str) -> Row:
        return next(row for row in self.rows if row.kind == kind)

    def __bool__(self) -> bool:
        """Whether anything was replaced."""
        return any(row.replaced for row in self.rows)

    def __str__(self) -> str:
        lines = [f"fastlm.optimize: {self.model}"]
        lines.append(f"  {'':10}{'replaced':>12}  {'by':34}{'error':>9}")
        for row in self.rows:
            by = f"{row.op} ({row.backend})" if row.replaced else "-"
            error = "" if row.error is None or not row.replaced else f"{row.error:.1e}"
            count = f"{row.replaced} of {row.found}"
            lines.append(f"  {row.kind:10}{count:>12}  {by:34}{error:>9}")
            lines += [f"  {'':10}  not {n}: {why}" for why, n in row.reasons.items()]
        return "\n".join(line.rstrip() for line in lines)


def count(reasons: list[str]) -> dict[str, int]:
    return dict(Counter(reasons))
