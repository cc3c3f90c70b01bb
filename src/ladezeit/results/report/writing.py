"""A report as files: Markdown, HTML and pictures side by side, and the form in which results are kept for good."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladezeit.errors import LadezeitError
from ladezeit.result import Result, write_atomically
from ladezeit.results.report.document import Report
from ladezeit.results.report.html import as_html
from ladezeit.results.report.markdown import as_markdown
from ladezeit.results.report.pictures import draw
from ladezeit.results.report.plots.canvas import Picture
from ladezeit.tracking.credentials import redact

_NAME = re.compile(r"[\w.+-]+")

#: The folders in front of a file's name, but for devices and addresses: they say where, on a machine that nobody knows.
_FOLDERS = re.compile(r"(?<![\w:/.…])/(?!dev/)(?:[^\s\"'\\/:|`)]+/)+(?=[^\s\"'\\/:|`)])")


def write(report: Report, folder: Path, name: str) -> list[Path]:
    """Write ``name.md``, ``name.html`` and the pictures into `folder`, over those of an earlier report.

    Returns the paths, Markdown and HTML first.

    Raises:
        LadezeitError: `name` is no name of a file.
    """
    _check(name)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(report, name)
    pictures = [picture for own in drawn for picture in own.all]
    text = redact(as_markdown(report, drawn, folder))
    paths = [folder / f"{name}.md", folder / f"{name}.html"]
    write_atomically(paths[0], text)
    write_atomically(paths[1], as_html(text, pictures, report.title))
    return [*paths, *_write_pictures(pictures, folder)]


def keep(report: Report, folder: Path, name: str) -> list[Path]:
    """Write ``name.md``, its pictures and ``name.jsonl`` (all results, one a line) into `folder`, to be kept.

    What the files say about the machine's own folders is cut out of them.

    Raises:
        LadezeitError: `name` is no name of a file, or something is kept under it already.
    """
    _check(name)
    kept, raw = folder / f"{name}.md", f"{name}.jsonl"
    for path in (kept, folder / raw):
        if path.exists():
            raise LadezeitError(f"{path} is kept already: choose another --name, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(report, name)
    lines = [_raw_line(result) for result in report.samples.results]
    write_atomically(folder / raw, "".join(f"{line}\n" for line in lines))
    write_atomically(kept, without_folders(redact(as_markdown(report, drawn, folder, raw))))
    return [kept, folder / raw, *_write_pictures([picture for own in drawn for picture in own.all], folder)]


def without_folders(text: str) -> str:
    """Return `text` with absolute paths cut to the names of their files.

    >>> without_folders("read /home/me/sweep/0/result.json from /dev/vda")
    'read …/result.json from /dev/vda'
    """
    return _FOLDERS.sub("…/", text)


def _check(name: str) -> None:
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise LadezeitError(f"--name '{name}': use letters, digits, '.', '_', '+' and '-'")


def _write_pictures(pictures: list[Picture], folder: Path) -> list[Path]:
    paths = []
    for picture in pictures:
        paths.append(folder / f"{picture.name}.png")
        paths[-1].write_bytes(picture.png)
    return paths


def _raw_line(result: Result) -> str:
    plain = result.to_dict()
    plain["config"] = {key: value for key, value in plain["config"].items() if key not in ("outputs", "tracking")}
    plain["environment"] = {key: value for key, value in plain["environment"].items() if key != "variables"}
    return json.dumps(_published(plain), ensure_ascii=False, allow_nan=False)


def _published(value: Any) -> Any:
    """Return plain data whose texts are without credentials and folders."""
    if isinstance(value, Mapping):
        return {key: _published(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_published(own) for own in value]
    return without_folders(redact(value)) if isinstance(value, str) else value
