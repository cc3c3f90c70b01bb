"""Credentials never leave the process: they are blanked in every text on its way to a store, a file or a message."""

import re

#: Keys of a query that speak of a secret or of who asks; a short word counts alone, or behind a separator.
_SECRET_KEY = (
    r"(?:[\w.\-]*(?:password|passwd|passphrase|secret|token|credential|signature|api_?key|access_?key)[\w.\-]*"
    r"|(?:[\w.\-]*[_.\-])?(?:user|username|pwd|pw|pass|key|auth|sig))"
)

# Logs of megabytes go through these: each starts with a literal and stops at the next blank, so that none is quadratic.
_USER_INFO = re.compile(r"://[^\s/?#'\"]*@")
#: A password may hold a raw slash: then what is before the host ends at the last @ in front of the next blank.
_USER_INFO_WITH_SLASH = re.compile(r"://[^\s/?#'\"@:]+:[^\s'\"@]+@")
#: As PostgreSQL's library writes an address: ``host=db user=me password=pw``.
_PAIR = re.compile(r"(?P<key>\b(?:password|passwd)=)(?!\*\*\*)[^&;\s'\"]+", re.IGNORECASE)
#: Only in an address: programs and pages are full of ``;key=``.
_ADDRESS = re.compile(r"://[^\s'\"]*")
_QUERY = re.compile(rf"(?P<key>[?&;]{_SECRET_KEY}=)(?!\*\*\*)[^&;\s'\"]+", re.IGNORECASE)


def redact_text(text: str) -> str:
    """Return `text` with ``user:password@`` taken out of every address and secrets out of its query.

    >>> redact_text("postgresql://me:pw@db:5432/runs?password=pw")
    'postgresql://***@db:5432/runs?password=***'
    """
    text = _USER_INFO.sub("://***@", text)
    text = _USER_INFO_WITH_SLASH.sub("://***@", text)
    text = _ADDRESS.sub(lambda found: _QUERY.sub(r"\g<key>***", found[0]), text)
    return _PAIR.sub(r"\g<key>***", text)


def holds_credentials(text: str) -> bool:
    """Say whether `text` holds an address with a user, a password, or a secret in its query."""
    return redact_text(text) != text


def without_credentials(uri: str) -> str:
    """Return an address that a browser can open: user and password are gone altogether."""
    return redact_text(uri).replace("://***@", "://")
