"""What the verification of a model costs: content and placement beside one pass over the same memory.

    python benchmarks/proof.py [--model NAME …] [--manifests DTYPE …] [--device cpu] [--samples 10] [--output FILE]

The model is loaded once by transformers and touched. Then, interleaved: one pass over the memory, the least that
reading every bit can cost, as `torch.sum` of 64-bit words with torch's own threads and, on the CPU, as sums by numpy
in a pool of threads (torch's threads wait for one another at every tensor); the digests of all tensors, on a GPU also
as where its kernel cannot be compiled; the whole level `content`; the level `placement`. Run it on a quiet machine.
Before, each model's manifests are made where there are none, for the checkpoint's dtype and those of ``--manifests``.

Output: a line a model, and one JSON document as the last line: medians and ranges in seconds, `content_over_pass` by
the faster of the passes, and in `manifest_s` what each manifest took. FILE is written after each part.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra import compose, initialize_config_module
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ladezeit.checkpoint.resolve import Checkpoint, prepare_checkpoint
from ladezeit.config import ValidationConfig, ValidationLevel, build_config
from ladezeit.config.hydra_support import register_schemas
from ladezeit.loading.base import EngineModel
from ladezeit.model.tensors import fault_in_pages
from ladezeit.system.files import cache_folder, write_atomically
from ladezeit.system.gpus import resolve_device
from ladezeit.system.limits import available_cpus
from ladezeit.timing.clock import Clock
from ladezeit.validation import digest, manifest
from ladezeit.validation.cuda_kernel import device_kernel
from ladezeit.validation.digest import digest_tensors
from ladezeit.validation.expected import Expected
from ladezeit.validation.inventory import group_tied, list_tensors
from ladezeit.validation.levels import verify_model
from ladezeit.validation.manifest import manifest_file
from ladezeit.validation.references import reference_key_of

SLICE_BYTES = 8 * 2**20


def main() -> None:
    """Measure each model and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["qwen2.5-1.5b-shape", "qwen3-moe-shape"])
    parser.add_argument("--manifests", nargs="*", default=[], metavar="DTYPE", help="make these too, as float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.device = resolve_device(arguments.device).name
    report: dict[str, Any] = {"benchmark": "proof", "device": arguments.device, "samples": arguments.samples}
    report |= {"cpus": available_cpus(), "torch": torch.__version__, "models": {}}
    if arguments.device != "cpu":
        report["gpu"] = torch.cuda.get_device_name(arguments.device)
        report["kernel"] = device_kernel(torch.device(arguments.device)) is not None

    def write() -> None:
        if arguments.output:
            write_atomically(arguments.output, json.dumps(report, indent=2) + "\n")

    register_schemas()
    for name in arguments.model:
        seconds = report.setdefault("manifest_s", {}).setdefault(name, {})
        for dtype in dict.fromkeys(["auto", *arguments.manifests]):
            started = time.perf_counter()
            manifest_of(name, arguments.device, dtype)
            seconds[dtype] = round(time.perf_counter() - started, 2)
            write()
        report["models"][name] = measured(name, arguments.device, arguments.samples)
        print(name, json.dumps(report["models"][name]))
        write()
    report["load_average"] = os.getloadavg()
    write()
    print(json.dumps(report))


def manifest_of(name: str, device: str, dtype: str = "auto") -> tuple[Checkpoint, Path]:
    """Return a model's checkpoint and the manifest of its contents in a dtype, both made where they are not there."""
    with initialize_config_module("ladezeit.conf", version_base="1.3"):
        asked = [f"model={name}", f"loading.dtype={dtype}", "outputs=outputs", "hydra/sweeper=basic"]
        config = build_config(compose("config", asked))
    checkpoint = prepare_checkpoint(config.model, cache_folder())
    return checkpoint, manifest_file(
        reference_key_of(config, checkpoint, device=device, hardware="", cache=cache_folder())
    )


def measured(name: str, device: str, samples: int) -> dict[str, Any]:
    """Return what proving one model costs; raises `AssertionError` where it is not proven."""
    checkpoint, file = manifest_of(name, device)
    placed = {} if device == "cpu" else {"device_map": {"": device}}
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=getattr(torch, checkpoint.dtype), **placed)
    fault_in_pages(model)
    tensors = {group[0].name: group[0].tensor for group in group_tied(list_tensors(model))}
    asked = Expected(device, checkpoint.dtype, True, False, False, manifest=manifest.read_manifest(file))
    ways: dict[str, Callable[[], object]] = {
        "pass_torch": lambda: one_pass(tensors, device),
        **({"pass_threads": lambda: one_pass_by_threads(tensors)} if device == "cpu" else {}),
        "digests": lambda: digest_tensors(tensors),
        **({"digests_torch": lambda: digests_without_kernel(tensors)} if device != "cpu" else {}),
        "content": lambda: proven(model, asked, ValidationLevel.content),
        "placement": lambda: proven(model, asked, ValidationLevel.placement),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(samples + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            if number:  # the first round warms
                seconds[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "tensors": len(tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        **{f"{way}_median_s": round(median, 5) for way, median in medians.items()},
        **{f"{way}_range_s": [round(min(times), 5), round(max(times), 5)] for way, times in seconds.items()},
        "content_over_pass": round(medians["content"] / min(medians[way] for way in medians if "pass" in way), 3),
    }


def one_pass(tensors: dict[str, torch.Tensor], device: str) -> None:
    """Read every tensor once, as fast as torch does."""
    for tensor in tensors.values():
        data = tensor.detach().reshape(-1).view(torch.uint8)
        data[: len(data) // 8 * 8].view(torch.int64).sum()
    if device != "cpu":
        torch.cuda.synchronize(device)


def digests_without_kernel(tensors: dict[str, torch.Tensor]) -> None:
    """Digest as where no kernel can be compiled for the GPU."""
    with mock.patch.object(digest, "device_kernel", lambda device: None):
        digest_tensors(tensors)


def one_pass_by_threads(tensors: dict[str, torch.Tensor]) -> None:
    """Read every tensor once, by as many threads as a digest takes."""
    words = [
        data[at : at + SLICE_BYTES].view("u8")
        for tensor in tensors.values()
        for data in [tensor.detach().reshape(-1).view(torch.uint8).numpy()]
        for at in range(0, len(data) // 8 * 8, SLICE_BYTES)
        if len(data[at : at + SLICE_BYTES]) % 8 == 0
    ]
    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(lambda part: part.sum(), words))


def proven(model: Any, asked: Expected, level: ValidationLevel) -> None:
    """Prove as a worker does."""
    verification = verify_model(EngineModel(model), asked, ValidationConfig(level), Clock(time.monotonic_ns()))
    assert verification.passed, verification.reason


if __name__ == "__main__":
    main()
