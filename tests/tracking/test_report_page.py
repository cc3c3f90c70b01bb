"""The report in a real browser: it asks for nothing, everything in it can be seen, and it prints."""

from pathlib import Path
from typing import Any

import pytest

import planted
from ladezeit.report.document import build_report
from ladezeit.report.render import write_report
from ladezeit.results.reader import read_paths

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_the_page_is_whole_without_a_network(browser: Any, tmp_path: Path) -> None:
    """Nobody who opens it years later, or on a plane, sees less; nothing is cut off on a laptop's screen."""
    sweep = planted.write(tmp_path / "sweep", planted.sweep(5))
    path = write_report(build_report(read_paths([sweep])), sweep / "report", "report")[1]
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    assert asked == [path.as_uri()] and said == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    drawings = page.get_by_role("img").all()
    assert len(drawings) == len(list(path.parent.glob("*.png")))
    assert all(drawing.bounding_box()["width"] > 600 for drawing in drawings)
    assert page.locator("h2 + p > strong").first.bounding_box()["y"] < 400, "the answer is on the first screen"
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    page.close()
