"""A check in words for people, and as one JSON document for programs."""

import json
import re
import socket
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from xml.etree import ElementTree as ET

from ladezeit.analysis.eligibility import format_value, more_is_better, unit_of
from ladezeit.analysis.regression import Check, Outcome, PointCheck
from ladezeit.analysis.statistics import LEVEL, MOST_SAMPLES

_TITLES = {
    Outcome.slower: "SLOWER",
    Outcome.broken: "BROKEN",
    Outcome.missing: "MISSING",
    Outcome.undecided: "undecided",
    Outcome.within: "within",
    Outcome.new: "new",
    Outcome.unproven_before: "unverified",
}

_SUMMARY = {
    Outcome.slower: "slower than allowed",
    Outcome.broken: "no longer verified",
    Outcome.missing: "missing",
    Outcome.undecided: "undecided",
    Outcome.within: "within the limit",
    Outcome.new: "new",
    Outcome.unproven_before: "not verified in the baseline",
}

SUITE = "ladezeit check"

#: Outcomes that are no test result: there was nothing to hold against anything.
_SKIPPED = (Outcome.missing, Outcome.new, Outcome.unproven_before)

#: What XML 1.0 does not allow in any form, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_text(checked: Check) -> str:
    """Return the check as lines: the points by their conditions, what closes the gate first, and the answer last."""
    lines: list[str] = []
    width = max(len(point.name) for point in checked.points)
    for title in dict.fromkeys(point.title for point in checked.points):
        lines += [title, *_lines(checked, title, width), ""]
    return "\n".join([*lines, describe_outcome(checked)])


def _lines(checked: Check, title: str, width: int) -> list[str]:
    lines = []
    for point in (point for point in checked.points if point.title == title):
        lines.append(f"  {_TITLES[point.outcome]:<10}  {point.name:<{width}}  {describe_point(point, checked)}")
        lines += [f"  {'':<10}  {'':<{width}}  ({note})" for note in point.notes]
    return lines


def describe_point(point: PointCheck, checked: Check) -> str:
    """Return what became of a point, with its figures, in one line."""
    if point.ratio is None:
        more = f" (at least {point.samples} samples on each side are needed)" if point.samples else ""
        return point.reason + more
    unit = unit_of(checked.metric)
    ratio, interval = point.ratio.estimate, point.ratio.interval
    how = "times less" if more_is_better(checked.metric) else "times as long" if unit == "s" else "times as much"
    figures = (
        f"{format_value(point.now, checked.metric)} {unit}, was {format_value(point.before, checked.metric)} {unit}: "
        f"{ratio:.3g} {how}, pairwise ({interval.low:.3g} to {interval.high:.3g} in the {interval.coverage:.1%} "
        f"interval)"
    )
    return f"{figures}; {point.reason}{_settled_by(point)}"


def _settled_by(point: PointCheck) -> str:
    if point.outcome is not Outcome.undecided:
        return ""
    if point.samples is None:
        return f"; more than {MOST_SAMPLES} samples on each side would be needed to settle it"
    return f"; about {point.samples} samples on each side would settle it"


def describe_outcome(checked: Check) -> str:
    """Return the answer in one line: ``passed`` or ``FAILED``, and how many points ended how."""
    counts = [f"{count} {_SUMMARY[outcome]}" for outcome in Outcome if (count := checked.count_outcome(outcome))]
    head = "FAILED" if checked.failing else "passed"
    return f"{head}: {', '.join(counts)} ({checked.metric}, {100 * checked.limit:.4g} % slower allowed)"


def as_document(checked: Check, **more: Any) -> str:
    """Return one JSON document with every figure unrounded; `more` is added at the top (what was read)."""
    document = {
        **more,
        "passed": not checked.failing,
        "answer": describe_outcome(checked),
        "metric": checked.metric,
        "unit": unit_of(checked.metric),
        "max_slowdown": checked.limit,
        "level": LEVEL,
        "missing_allowed": checked.allow_missing,
        "counts": {outcome.value: checked.count_outcome(outcome) for outcome in Outcome},
        "points": [_plain(point, checked) for point in checked.points],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(point: PointCheck, checked: Check) -> dict[str, Any]:
    interval = point.ratio.interval if point.ratio else None
    return {
        "conditions": point.conditions,
        "name": point.name,
        "outcome": point.outcome.value,
        "failing": point in checked.failing,
        "reason": point.reason,
        "n_before": point.n_before,
        "n_now": point.n_now,
        "median_before": point.before,
        "median_now": point.now,
        "ratio": point.ratio.estimate if point.ratio else None,
        "ratio_low": interval.low if interval else None,
        "ratio_high": interval.high if interval else None,
        "ratio_coverage": interval.coverage if interval else None,
        "p_holm": point.p,
        "samples_to_settle": point.samples,
        "notes": point.notes,
    }


# A check as JUnit XML: one test case a point, as Jenkins' and Ant's schemas both want it.


def as_junit(checked: Check, moment: datetime, read: Mapping[str, str]) -> str:
    """Return the XML document.

    Args:
        checked: the check.
        moment: when it was made, in UTC.
        read: what was read, written as properties.
    """
    skipped = [point for point in checked.points if _is_skipped(point, checked)]
    counts = {"tests": str(len(checked.points)), "failures": str(len(checked.failing)), "errors": "0"}
    root = ET.Element("testsuites")  # Ant's schema allows no attribute here
    own = {
        "name": SUITE,
        **counts,
        "skipped": str(len(skipped)),
        "time": "0",
        "timestamp": moment.strftime("%Y-%m-%dT%H:%M:%S"),
        "hostname": _safe(socket.gethostname()) or "localhost",
        "id": "0",
        "package": "ladezeit",
    }
    suite = ET.SubElement(root, "testsuite", own)
    properties = ET.SubElement(suite, "properties")
    known = {"metric": checked.metric, "max_slowdown": f"{checked.limit:g}", **read}
    for name, value in known.items():
        ET.SubElement(properties, "property", {"name": name, "value": _safe(value)})
    for point in checked.points:
        _case(suite, point, checked)
    ET.SubElement(suite, "system-out").text = _safe(describe_outcome(checked))
    ET.SubElement(suite, "system-err")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, point: PointCheck, checked: Check) -> None:
    seconds = point.now if unit_of(checked.metric) == "s" and point.now is not None else 0.0
    named = {"name": _safe(point.name), "classname": _safe(point.title) or SUITE, "time": f"{seconds:.6f}"}
    case = ET.SubElement(suite, "testcase", named)
    said = _safe(describe_point(point, checked))
    if point in checked.failing:
        failure = ET.SubElement(case, "failure", {"type": point.outcome.value, "message": said})
        failure.text = _safe("\n".join([describe_point(point, checked), *point.notes]))
    elif _is_skipped(point, checked):
        ET.SubElement(case, "skipped", {"message": said})


def _is_skipped(point: PointCheck, checked: Check) -> bool:
    return point.outcome in _SKIPPED and point not in checked.failing


def _safe(text: str) -> str:
    r"""Return `text` with characters that no XML document may hold written as ``\x1b``."""
    return _NOT_XML.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
