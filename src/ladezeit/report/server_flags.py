"""A measured method in the words of servers that load models themselves: the flags of vLLM and SGLang that mean it.

Flags are those of vLLM 0.20 (`vllm/config/load.py`, https://docs.vllm.ai/en/latest/models/extensions/) and SGLang 0.5
(https://docs.sglang.io/docs/advanced_features/model_loading). What a server has no flag for is said, not approximated:
its own time has to be measured there.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

VLLM = "vllm"
SGLANG = "sglang"
_START = {VLLM: ("vllm", "serve"), SGLANG: ("python3", "-m", "sglang.launch_server", "--model-path")}


@dataclass(frozen=True)
class ServerFlags:
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


@dataclass(frozen=True)
class _Ways:
    """Both servers' flags for an engine, from its arguments; None for none."""

    vllm: Callable[[Mapping[str, Any]], tuple[str, ...]] | None
    sglang: Callable[[Mapping[str, Any]], tuple[str, ...]] | None
    note: str = ""


def export_flags(entry: Mapping[str, Any], model: str | None = None) -> list[ServerFlags]:
    """Return how each server loads like an entry of a loading profile (see `analysis.profile_writer`).

    `model` is what the servers are given: a hub id or a folder; None takes the entry's name for it.
    """
    loading = entry["loading"]
    engine = str(loading.get("engine", ""))
    name = model or str(entry.get("model", "MODEL"))
    method = str(entry.get("method") or loading.get("name") or engine)
    ways = _ways(engine, loading)
    dtype = ("--dtype", str(entry["dtype"])) if entry.get("dtype") else ()
    return [
        ServerFlags(server, name, method, (*flags(loading), *dtype) if flags is not None else None, ways.note)
        for server, flags in ((VLLM, ways.vllm), (SGLANG, ways.sglang))
    ]


def as_text(handed: list[ServerFlags]) -> str:
    """Return the commands as lines for a terminal or a file of notes."""
    lines = []
    for each in handed:
        lines.append(f"# {each.model} by {each.method}, {each.server}" + (f": {each.note}" if each.note else ""))
        lines.append(each.command or f"# {each.server} has no such flag: measure its own loaders on that server")
    return "\n".join(lines)


def _ways(engine: str, loading: Mapping[str, Any]) -> _Ways:
    if engine in ("transformers", "accelerate") and isinstance(loading.get("device_map"), dict):
        return _Ways(None, None, "its own placement over devices; servers split by --tensor-parallel-size instead")
    if engine == "transformers" and loading.get("disable_mmap"):
        return _WAYS["safetensors_pread"]
    return _WAYS.get(engine, _Ways(None, None, f"'{engine}' is no engine that servers have"))


def _format(name: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    return lambda loading: ("--load-format", name)


def _runai(loading: Mapping[str, Any]) -> tuple[str, ...]:
    asked = {"concurrency": loading.get("threads"), "memory_limit": loading.get("buffer_bytes")}
    extra = {key: value for key, value in asked.items() if value is not None}
    flags = ("--load-format", "runai_streamer")
    return (*flags, "--model-loader-extra-config", json.dumps(extra)) if extra else flags


def _vllm_eager(loading: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--load-format", "safetensors", "--safetensors-load-strategy", "eager")


def _sglang_eager(loading: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--load-format", "safetensors", "--weight-loader-disable-mmap")


def _vllm_mapped(loading: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--load-format", "safetensors", "--safetensors-load-strategy", "lazy")


def _bitsandbytes(loading: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--load-format", "bitsandbytes", "--quantization", "bitsandbytes")


_OURS = "ladezeit's own reader, which servers do not have; the nearest are runai_streamer and fastsafetensors"
_MAPPED = _Ways(_vllm_mapped, _format("safetensors"))
_FAST = _Ways(_format("fastsafetensors"), _format("fastsafetensors"), "uses GPU direct storage where it is there")

_WAYS: dict[str, _Ways] = {
    "transformers": _MAPPED,
    "legacy_manager": _MAPPED,
    "accelerate": _MAPPED,
    "safetensors_mmap": _MAPPED,
    "safetensors_pread": _Ways(_vllm_eager, _sglang_eager, "whole shards go through host memory"),
    "fastsafetensors": _FAST,
    "fastsafetensors_gds": _FAST,
    "runai_streamer": _Ways(_runai, _runai, "pip install 'vllm[runai]', or runai-model-streamer beside SGLang"),
    "instanttensor": _Ways(_format("instanttensor"), None, "pip install instanttensor"),
    "tensorizer": _Ways(
        _format("tensorizer"), None, "needs the model in vLLM's own tensorizer form: tensorize_vllm_model.py makes it"
    ),
    "gguf": _Ways(_format("gguf"), _format("gguf"), "give the .gguf file as the model"),
    "bitsandbytes_4bit": _Ways(_bitsandbytes, _bitsandbytes),
    "streamed": _Ways(None, None, _OURS),
    "auto": _Ways(None, None, "chosen anew at each load: hand over what it chose (effective.engine of a sample)"),
}
