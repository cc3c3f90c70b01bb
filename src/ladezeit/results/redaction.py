"""Credentials never leave the process: they are blanked in every text on its way to a store, a file or a message."""

import re

# Logs of megabytes go through these: each starts with a literal and stops at the next blank, so that none is quadratic.
_USER_INFO = re.compile(r"://[^\s/?#'\"]*@")
#: A password may hold a raw slash: then what is before the host ends at the last @ in front of the next blank.
_USER_INFO_WITH_SLASH = re.compile(r"://[^\s/?#'\"@:]+:[^\s'\"@]+@")
_QUERY = re.compile(
    r"(?P<key>[?&][\w.\-]*(?:password|passwd|pwd|token|secret|api_key)[\w.\-]*=)[^&\s'\"]+", re.IGNORECASE
)


def redact_text(text: str) -> str:
    """Return `text` with ``user:password@`` taken out of every address and secrets out of its query.

    >>> redact("postgresql://me:pw@db:5432/runs?password=pw")
    'postgresql://***@db:5432/runs?password=***'
    """
    text = _USER_INFO.sub("://***@", text)
    text = _USER_INFO_WITH_SLASH.sub("://***@", text)
    return _QUERY.sub(r"\g<key>***", text)


def without_credentials(uri: str) -> str:
    """Return an address that a browser can open: user and password are gone altogether."""
    return redact_text(uri).replace("://***@", "://")
