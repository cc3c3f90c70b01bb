"""The profiler of a sample: where its load and its validation spend their time, function by function.

pyinstrument looks at the stack every millisecond from inside the process: no rights are needed, and only what runs
between start and stop is seen. It sees the thread that loads; threads of an engine show as their owner waiting for
them. In the lists of functions, time in built-in and native code counts as its caller's own.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.errors import NotRunnableError
from ladezeit.system.files import write_atomically

if TYPE_CHECKING:
    from pyinstrument.frame import Frame
    from pyinstrument.session import Session

PAGE_FILE = "profile.html"
SPEEDSCOPE_FILE = "profile.speedscope.json"
INTERVAL_S = 0.001

_MOST_FUNCTIONS = 15
_BUILT_IN = "<built-in>"
#: The page asks for a font over the network and looks the same without.
_FONT = "https://fonts.googleapis.com/css?family=Source+Code+Pro:400,600|Source+Sans+Pro:400,600&display=swap"


def check_installed() -> None:
    """Raise `NotRunnableError` where the profiler's package is not installed."""
    if find_spec("pyinstrument") is None:
        raise NotRunnableError("profile=true needs pyinstrument, not installed: pip install 'ladezeit[profile]'")


class Profiler:
    """Samples parts of a measurement, each by its name, and writes what it saw."""

    def __init__(self) -> None:
        import pyinstrument  # noqa: F401  (before any clock runs)

        self._sessions: dict[str, Session] = {}

    @contextmanager
    def sample_block(self, part: str) -> Iterator[None]:
        """Sample the block as `part`, whatever ends it."""
        from pyinstrument import Profiler as Sampler

        sampler = Sampler(interval=INTERVAL_S, async_mode="disabled")
        sampler.start()
        try:
            yield
        finally:
            self._sessions[part] = sampler.stop()

    def save_profile(self, folder: Path) -> dict[str, Any]:
        """Write ``profile.html`` and ``profile.speedscope.json``, and return what goes into the result.

        Returns:
            The interval, and for each part its functions by own time: name, file and line, own and total seconds.
        """
        from pyinstrument.renderers import HTMLRenderer, SpeedscopeRenderer
        from pyinstrument.session import Session

        sessions = list(self._sessions.values())
        if not sessions:
            return {}
        whole = sessions[0]
        for session in sessions[1:]:
            whole = Session.combine(whole, session)
        write_atomically(folder / PAGE_FILE, HTMLRenderer().render(whole).replace(_FONT, "data:text/css,"))
        write_atomically(folder / SPEEDSCOPE_FILE, SpeedscopeRenderer(show_all=True).render(whole))
        modules = _modules_by_file()
        functions = {part: _functions(session, modules) for part, session in self._sessions.items()}
        return {"interval_s": INTERVAL_S, "functions": functions}


def _modules_by_file() -> dict[str, str]:
    files = ((getattr(module, "__file__", None), name) for name, module in list(sys.modules.items()))
    return {file: name for file, name in files if file}


def _functions(session: "Session", modules: dict[str, str]) -> list[dict[str, Any]]:
    """Return the functions that most of the own time was spent in, largest first."""
    own_s: dict[str, float] = {}
    total_s: dict[str, float] = {}
    names: dict[str, tuple[str, str]] = {}
    root = session.root_frame(trim_stem=False)
    # Frame, and the functions that it is inside of: a function that calls itself counts once in its total.
    waiting: list[tuple[Frame, frozenset[str]]] = [(root, frozenset())] if root is not None else []
    while waiting:
        frame, around = waiting.pop()
        inner = list(_called(frame))
        key = frame.identifier
        own_s[key] = own_s.get(key, 0.0) + frame.time - sum(child.time for child in inner)
        if key not in around:
            total_s[key] = total_s.get(key, 0.0) + frame.time
        if key not in names or frame.class_name:
            names[key] = _name(frame, modules)
        waiting += [(child, around | {key}) for child in inner]
    largest = sorted((key for key in own_s if own_s[key] > 0), key=lambda key: -own_s[key])[:_MOST_FUNCTIONS]
    return [
        {"function": names[k][0], "place": names[k][1], "own_s": round(own_s[k], 4), "total_s": round(total_s[k], 4)}
        for k in largest
    ]


def _called(frame: "Frame") -> Iterator["Frame"]:
    """Yield the Python functions that a function called, by itself or through built-in ones (``sorted``, ``map``)."""
    for child in frame.children:
        if child.file_path == _BUILT_IN:
            yield from _called(child)
        elif not child.is_synthetic:
            yield child


def _name(frame: "Frame", modules: dict[str, str]) -> tuple[str, str]:
    """Return ``module:Class.function`` and ``file:line`` of a frame."""
    file = frame.file_path or ""
    module = modules.get(file, Path(file).stem)
    owner = f"{frame.class_name}." if frame.class_name else ""
    return f"{module}:{owner}{frame.function}", f"{file}:{frame.line_no}"
