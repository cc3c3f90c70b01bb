"""A report as one HTML file that needs nothing else: style and pictures are in it, no address leads out of it."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from ladezeit.results.report.plots.canvas import Picture

_STYLE = "report.css"


def as_html(markdown: str, pictures: Sequence[Picture], title: str) -> str:
    """Return `markdown` as an HTML page with `pictures` inside, found by the names of their files.

    HTML in the Markdown is shown, not obeyed: reasons and names come from whatever was loaded.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    drawn = {f"{picture.name}.png": picture for picture in pictures}
    for token in tokens:
        if token.children:
            token.children = [_inner(child, drawn) for child in token.children]
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    style = (files(__package__) / _STYLE).read_text(encoding="utf-8")
    return _PAGE.format(title=escape(title), style=style, body=body)


def _inner(token: Any, drawn: dict[str, Picture]) -> Any:
    """Put pictures in the place of their addresses, and take the address from whatever would lead outside."""
    if token.type == "image":
        found = drawn.get(str(token.attrs.get("src")))
        return _html(_svg(found) if found else escape(token.content))
    if token.type == "link_open":
        address = urlsplit(str(token.attrs.get("href", "")))
        if address.scheme or address.netloc:
            token.attrs = {}
    return token


def _html(text: str) -> Any:
    from markdown_it.token import Token

    return Token("html_inline", "", 0, content=text)


def _svg(picture: Picture) -> str:
    """Return the picture as an inline drawing that says to a screen reader what is to be seen."""
    text = picture.svg.decode()
    drawing = text[text.index("<svg") :]
    # Several drawings share one page: what one defines must not be taken for another's.
    drawing = drawing.replace('id="', f'id="{picture.name}.').replace('href="#', f'href="#{picture.name}.')
    drawing = drawing.replace("url(#", f"url(#{picture.name}.")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(picture.alt)}" ', 1)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""
