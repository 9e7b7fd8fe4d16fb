"""Implementations beside each other: they take turns, and their times are given as ratios."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from m2f_video.benchmark import PARTS, Part, Report, Row, measure_part


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """Something to measure.

    Attributes:
        name: in tables.
        dtype: it runs in.
        parts: what to call, by a name of `PARTS`.
        counted: the same parts in eager form, to count FLOPs of; empty where `parts` are eager.
        missing: why a part is not measured, by its name.
    """

    name: str
    dtype: torch.dtype
    parts: Mapping[str, Part]
    counted: Mapping[str, Part] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Names of implementation and dtype."""
        return self.name, str(self.dtype).removeprefix("torch.")


def measure_parts(
    implementations: Sequence[Implementation], *, frames: int, device: Any = "cpu", **options: Any
) -> list[Row]:
    """Time every part, as `measure_part` does, and note what is missing."""
    rows: list[Row] = []
    for part in PARTS:
        functions = {each.key: each.parts[part] for each in implementations if part in each.parts}
        counted = {each.key: (each.counted or each.parts)[part] for each in implementations if part in each.parts}
        measured = measure_part(part, functions, counted, frames=frames, device=device, **options) if functions else []
        found = {(row.implementation, row.dtype): row for row in measured}
        for each in implementations:
            name, dtype = each.key
            if each.key in found:
                rows.append(found[each.key])
            elif part in each.missing:
                missing = {"device": str(device), "frames": frames, "note": each.missing[part]}
                rows.append(Row(part=part, implementation=name, dtype=dtype, **missing))
    return rows


@dataclass(frozen=True, kw_only=True)
class Comparison(Report):
    """A report with ratios.

    Attributes:
        baselines: implementations, as multiples of whose times those of the same part and dtype are given too.
    """

    baselines: Sequence[str] = ()

    def ratios(self, row: Row) -> dict[str, float | None]:
        """Median of a row by that of each baseline; None where one of them was not measured."""
        same = [
            other
            for other in self.rows
            if (other.part, other.dtype, other.device, other.frames) == (row.part, row.dtype, row.device, row.frames)
        ]
        medians = {other.implementation: other.quartiles[1] for other in same if other.seconds}
        return {
            name: row.quartiles[1] / medians[name] if row.seconds and name in medians else None
            for name in self.baselines
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        report = super().to_dict()
        rows = zip(report["rows"], self.rows, strict=True)
        return report | {"rows": [found | {"ratio_to": self.ratios(row)} for found, row in rows]}

    def columns(self, row: Row) -> dict[str, str]:
        """Ratios, then what every report has."""
        ratios = {"\n".join(f"/ {name}".rsplit(" ", 1)): ratio for name, ratio in self.ratios(row).items()}
        return {name: "" if ratio is None else f"{ratio:.2f}" for name, ratio in ratios.items()} | super().columns(row)
