"""Small real checkpoints for the tests of this folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 255,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE: dict[str, Any] = {
    **QWEN2,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 16,
    "tie_word_embeddings": False,
}


def write_shard(path: Path, **tensors: Any) -> None:
    """Write a real safetensors file; each tensor is an array, or a length for float32 zeros."""
    arrays = {
        name: np.zeros(value, np.float32) if isinstance(value, int) else np.asarray(value)
        for name, value in tensors.items()
    }
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def single(folder: Path, **config: Any) -> Path:
    """A folder with one shard of two tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "qwen2", **config})
    write_shard(folder / "model.safetensors", b=[1.0, 2.0], a=np.arange(6, dtype=np.float16).reshape(2, 3))
    return folder


def sharded(folder: Path) -> Path:
    """A folder with an index and two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "qwen2"})
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_shard(folder / first, a=4)
    write_shard(folder / second, b=2, c=1)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": 28}, "weight_map": {"a": first, "b": second, "c": second}},
    )
    return folder


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter and return how it ended."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def started(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """Start `code` in a fresh interpreter in its own process group, as a terminal would."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """Send the signal to the process's whole group, as Ctrl-C does, and return its standard error."""
    os.killpg(process.pid, number)
    return process.communicate(timeout=60)[1]


def wait_for(what: Any, limit_s: float = 30.0) -> None:
    """Wait until ``what()`` is true; fails where it never is."""
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
