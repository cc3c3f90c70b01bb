"""A check as JUnit XML: one test case a point, as Jenkins' and Ant's schemas both want it."""

import re
import socket
from collections.abc import Mapping
from datetime import datetime
from xml.etree import ElementTree as ET

from ladezeit.results.objectives import unit_of
from ladezeit.results.regression.judging import Check, Outcome, PointCheck
from ladezeit.results.regression.words import answer, sentence

SUITE = "ladezeit check"

#: Outcomes that are no test result: there was nothing to hold against anything.
_SKIPPED = (Outcome.missing, Outcome.new, Outcome.unproven_before)

#: What XML 1.0 does not allow in any form, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


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
    ET.SubElement(suite, "system-out").text = _safe(answer(checked))
    ET.SubElement(suite, "system-err")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, point: PointCheck, checked: Check) -> None:
    seconds = point.now if unit_of(checked.metric) == "s" and point.now is not None else 0.0
    named = {"name": _safe(point.name), "classname": _safe(point.title) or SUITE, "time": f"{seconds:.6f}"}
    case = ET.SubElement(suite, "testcase", named)
    said = _safe(sentence(point, checked))
    if point in checked.failing:
        failure = ET.SubElement(case, "failure", {"type": point.outcome.value, "message": said})
        failure.text = _safe("\n".join([sentence(point, checked), *point.notes]))
    elif _is_skipped(point, checked):
        ET.SubElement(case, "skipped", {"message": said})


def _is_skipped(point: PointCheck, checked: Check) -> bool:
    return point.outcome in _SKIPPED and point not in checked.failing


def _safe(text: str) -> str:
    r"""Return `text` with characters that no XML document may hold written as ``\x1b``."""
    return _NOT_XML.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
