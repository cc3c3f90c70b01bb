"""Processes that have torch and transformers imported already, for tests of what they do and not of how they start."""

import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "ladezeit.model.classes",
        "ladezeit.validation.provenance",
        "ladezeit.validation.manifest",
        "ladezeit.validation.logits",
        "bitsandbytes",
        "gguf",
        "tensorizer",
        "torchao.quantization",
        "transformers.integrations.bitsandbytes",
        "transformers.models.auto.modeling_auto",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "transformers.quantizers.quantizer_torchao",
    ]
)


def answer_apart(
    module: str, arguments: list[str], environment: dict[str, str], limit_s: float | None, on_progress: Any
) -> tuple[int, str]:
    """Do what `ladezeit.system.processes.run_module` does: in a process of its own, forked from one that is warm.

    It tells nobody how far it is.
    """
    errors = Path(arguments[1]).with_name("stderr")
    process = _SERVER.Process(target=_answer, args=(errors, module, arguments, environment))
    process.start()
    process.join(limit_s)
    process.kill()
    process.join()
    return process.exitcode or 0, errors.read_text()


def _answer(errors: Path, module: str, arguments: list[str], environment: dict[str, str]) -> None:
    from ladezeit.system.processes import answer_request

    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    os.environ.update(environment)
    sys.exit(answer_request(import_module(module).make, arguments))
