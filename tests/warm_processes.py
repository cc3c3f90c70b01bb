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


def answer_apart(module: str, arguments: list[str], environment: dict[str, str], limit_s: float) -> tuple[int, str]:
    """Do what `ladezeit.system.processes.run_module` does: in a process of its own, forked from one that is warm."""
    return _run(_answer, Path(arguments[1]).parent, (module, arguments, environment), limit_s)


def convert_apart(target: str, checkpoint: Any, folder: Path, told: Any) -> None:
    """Do what the other side of `ladezeit.loading.conversion` does, likewise; it tells nobody how far it is."""
    code, said = _run(_convert, folder.parent, (target, checkpoint, folder), 300)
    assert code == 0, said


def _run(target: Any, folder: Path, arguments: tuple[Any, ...], limit_s: float) -> tuple[int, str]:
    errors = folder / f".stderr-{os.getpid()}"
    process = _SERVER.Process(target=target, args=(errors, *arguments))
    process.start()
    process.join(limit_s)
    process.kill()
    process.join()
    said = errors.read_text()
    errors.unlink()
    return process.exitcode or 0, said


def _answer(errors: Path, module: str, arguments: list[str], environment: dict[str, str]) -> None:
    from ladezeit.system.processes import answer_request

    _redirect(errors)
    os.environ.update(environment)
    sys.exit(answer_request(import_module(module).make, arguments))


def _convert(errors: Path, target: str, checkpoint: Any, folder: Path) -> None:
    from ladezeit.loading.conversion import converter_of

    _redirect(errors)
    converter_of(target).write_files(checkpoint, folder, lambda done: None)


def _redirect(errors: Path) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
