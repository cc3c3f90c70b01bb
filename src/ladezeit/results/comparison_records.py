"""A comparison as data for programs: flat records, CSV, JSON."""

import csv
import io
import json
from typing import Any

from ladezeit.results.comparison import Comparison, PointFigures, Section
from ladezeit.results.comparison_table import ordered
from ladezeit.results.objectives import unit_of


def records(comparison: Comparison, sort: str = "rank") -> list[dict[str, Any]]:
    """Return one flat record a point, unrounded, the ranked ones of each section first."""
    return [
        _record(comparison, section, point)
        for section in comparison.sections
        for point in [*ordered(section.ranked, sort), *section.apart]
    ]


def _record(comparison: Comparison, section: Section, point: PointFigures) -> dict[str, Any]:
    spread, ratio = point.spread, point.ratio
    return {
        **section.conditions,
        **point.values,
        "point": point.point,
        "metric": comparison.metric,
        "rank": point.rank,
        "n": spread.n if spread else 0,
        "median": spread.median if spread else None,
        "mad": spread.mad if spread else None,
        "min": spread.least if spread else None,
        "max": spread.largest if spread else None,
        "p95": spread.p95 if spread else None,
        "interval_low": spread.interval.low if spread else None,
        "interval_high": spread.interval.high if spread else None,
        "interval_coverage": spread.interval.coverage if spread else None,
        "baseline": section.baseline.name if section.baseline else None,
        "ratio": ratio.estimate if ratio else None,
        "ratio_low": ratio.interval.low if ratio else None,
        "ratio_high": ratio.interval.high if ratio else None,
        "ratio_coverage": ratio.interval.coverage if ratio else None,
        "p_holm": point.p,
        "ceiling_share": point.ceiling_share,
        "proof": point.level,
        "excluded": point.excluded,
        "outliers": list(spread.outliers) if spread else [],
        "counts": point.counts,
        "problems": point.problems,
    }


def as_csv(comparison: Comparison, sort: str = "rank") -> str:
    """Return the records as CSV; lists and counts are written as JSON."""
    rows = records(comparison, sort)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return out.getvalue()


def as_json(comparison: Comparison, sort: str = "rank", **more: Any) -> str:
    """Return one JSON document: the records, the notes, and what the caller adds."""
    document = {"metric": comparison.metric, "unit": unit_of(comparison.metric), "points": records(comparison, sort)}
    return json.dumps({**document, "notes": comparison.notes, **more}, indent=2, ensure_ascii=False, allow_nan=False)
