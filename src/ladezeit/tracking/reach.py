"""Whether anything answers at a store's address, found out in seconds and before MLflow starts to retry."""

import socket
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass, urlopen

from ladezeit.errors import TrackingError
from ladezeit.tracking.credentials import redact, without_credentials

_CONNECT_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 3.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_reachable(uri: str) -> None:
    """Connect to the host of `uri` once, so that a dead server costs seconds and not MLflow's retries.

    Raises:
        TrackingError: the address has no host, or nothing answers there.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.split("+")[0]
    if scheme not in _PORTS:
        if scheme in ("", "file", "sqlite"):
            raise TrackingError(f"tracking.uri={redact(uri)} is no server's address: use http://host:5000")
        return
    try:
        host, port = parts.hostname, parts.port or _PORTS[scheme]
    except ValueError:
        host, port = None, 0
    if not host:
        raise TrackingError(f"tracking.uri={redact(uri)} names no host: use http://host:5000")
    if scheme in getproxies() and not proxy_bypass(host):
        return  # the way there leads over a proxy: connecting directly would prove nothing
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as cause:
        raise TrackingError(
            f"nothing answers at {redact(uri)} ({cause.strerror or cause}): start the server there, correct the "
            f"address, or use tracking=sqlite; tracking=none measures without MLflow"
        ) from None


def check_answers(uri: str) -> None:
    """Ask an MLflow server for its health; one that hangs is found out in three seconds.

    Raises:
        TrackingError: there was no answer at all (any status is one).
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urlopen(f"{without_credentials(uri).rstrip('/')}/health", timeout=_ANSWER_TIMEOUT_S).close()
    except HTTPError:
        return
    except OSError as cause:
        raise TrackingError(
            f"the server at {redact(uri)} does not answer ({cause}): it may hang; the results "
            f"can be imported when it does"
        ) from None
