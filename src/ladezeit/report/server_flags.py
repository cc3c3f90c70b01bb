"""A measured method in the words of servers that load models themselves: the flags of vLLM and SGLang that mean it.

An engine's file knows its flags (`ladezeit.config.engines.ServerFlags`). What a server has no flag for is said, not
approximated: its own time has to be measured there.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ladezeit.config.engines import ServerFlags, find_engines

VLLM = "vllm"
SGLANG = "sglang"
_START = {VLLM: ("vllm", "serve"), SGLANG: ("python3", "-m", "sglang.launch_server", "--model-path")}


@dataclass(frozen=True)
class ServerCommand:
    """One server's way to load as `method` did: its `flags`, None where it has none, and what to know about it."""

    server: str
    model: str
    method: str
    flags: tuple[str, ...] | None
    note: str = ""

    @property
    def command(self) -> str | None:
        """The command line that starts the server so; None where there is no such flag."""
        if self.flags is None:
            return None
        return shlex.join([*_START[self.server], self.model, *self.flags])


def export_flags(entry: Mapping[str, Any], model: str | None = None) -> list[ServerCommand]:
    """Return how each server loads like an entry of a loading profile (see `analysis.profile_writer`).

    `model` is what the servers are given: a hub id or a folder; None takes the entry's name for it.
    """
    loading = entry["loading"]
    engine = str(loading.get("engine", ""))
    name = model or str(entry.get("model", "MODEL"))
    method = str(entry.get("method") or loading.get("name") or engine)
    known = _flags(engine, loading)
    dtype = ("--dtype", str(entry["dtype"])) if entry.get("dtype") else ()
    return [
        ServerCommand(server, name, method, (*flags, *dtype) if flags is not None else None, known.note)
        for server, flags in ((VLLM, known.vllm), (SGLANG, known.sglang))
    ]


def as_text(handed: list[ServerCommand]) -> str:
    """Return the commands as lines for a terminal or a file of notes."""
    lines = []
    for each in handed:
        lines.append(f"# {each.model} by {each.method}, {each.server}" + (f": {each.note}" if each.note else ""))
        lines.append(each.command or f"# {each.server} has no such flag: measure its own loaders on that server")
    return "\n".join(lines)


def _flags(engine: str, loading: Mapping[str, Any]) -> ServerFlags:
    facts = find_engines().get(engine)
    if facts is None or facts.servers is None:
        return ServerFlags(None, None, f"'{engine}' is no engine that servers have")
    return facts.servers(loading) if callable(facts.servers) else facts.servers
