"""What the libraries themselves notice of faults in files, each called as its own guide says and nothing around it.

    python tests/faults/peers.py <request.json>     # the other side: one library in a process of its own

A library that ends its process with a crash is started again for the faults that are left.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from file_faults import IN_FILES, UP, names_of, places_in, places_in_conversion, plant

from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint
from ladezeit.validation.faults import Fault

LIMIT_S = 300.0
CRASHED, ERROR, UNNAMED, WARNING, SILENT = "crash", "error", "error, no name", "warning", "no"
#: How the two libraries that can offload say so, as far as they do.
_OFFLOADED = r"offload|on the disk"


@dataclass(frozen=True)
class Peer:
    """A library: its package, how it loads a folder, and whether it reads a file of its own that `convert` writes."""

    package: str
    load: Callable[[Path], Any]
    convert: Callable[[Path, Path], None] | None = None
    offload: Callable[[Path, Path], Any] | None = None


def _transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def _transformers_offload(folder: Path, away: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": 2_500_000}, offload_folder=str(away)
    )


def _accelerate(folder: Path, **arguments: Any) -> Any:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, folder, **({"device_map": {"": "cpu"}} | arguments))


def _accelerate_offload(folder: Path, away: Path) -> Any:
    return _accelerate(folder, device_map="auto", max_memory={"cpu": 2_500_000}, offload_folder=str(away))


def _safetensors(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(_file(folder))


def _fastsafetensors(folder: Path) -> Any:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
    loader.add_filenames({0: [str(_file(folder))]})
    buffers = loader.copy_files_to_device()
    return {name: buffers.get_tensor(name).clone() for name in loader.get_keys()}


def _runai(folder: Path) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(_file(folder)))
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


def _tensorizer(folder: Path, verify_hash: bool = False) -> Any:
    from tensorizer import TensorDeserializer

    with TensorDeserializer(str(folder / "model.tensors"), device="cpu", verify_hash=verify_hash) as read:
        return {name: read[name] for name in read}


def _tensorizer_verified(folder: Path) -> Any:
    return _tensorizer(folder, verify_hash=True)


def _to_tensors(folder: Path, file: Path) -> None:
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(file))
    serializer.write_state_dict(load_file(_file(folder)))
    serializer.close()


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"


PEERS = {
    "transformers": Peer("transformers", _transformers, offload=_transformers_offload),
    "accelerate": Peer("accelerate", _accelerate, offload=_accelerate_offload),
    "safetensors": Peer("safetensors", _safetensors),
    "fastsafetensors": Peer("fastsafetensors", _fastsafetensors),
    "Run:ai": Peer("runai-model-streamer", _runai),
    "tensorizer": Peer("tensorizer", _tensorizer, _to_tensors),
    "tensorizer verify_hash": Peer("tensorizer", _tensorizer_verified, _to_tensors),
}


def noticed(name: str, checkpoint: Checkpoint, scratch: Path) -> dict[str, dict[str, str]]:
    """Return for each fault what the library `name` did: ``noticed`` (one of the words above) and what it ``said``."""
    peer = PEERS[name]
    cases = _cases(peer, checkpoint, scratch)
    folder = scratch / f"{peer.package}-whole" if peer.convert else checkpoint.folder
    whole = {"peer": name, "whole": str(folder)}
    answers: dict[str, dict[str, str]] = {}
    while left := [case for case in cases if case["fault"] not in answers]:
        request, output = scratch / "request.json", scratch / "output.jsonl"
        request.write_text(json.dumps(whole | {"cases": left, "output": str(output)}))
        output.write_text("")
        with tempfile.TemporaryFile() as log:
            command = [sys.executable, str(Path(__file__)), str(request)]
            ended = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=LIMIT_S)
        told = [json.loads(line) for line in output.read_text().splitlines()]
        answers.update({one.pop("fault"): one for one in told})
        if ended.returncode != 0:
            answers[left[len(told)]["fault"]] = {"noticed": CRASHED, "said": f"exit code {ended.returncode}"}
    return answers


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are asked."""
    return {peer.package: version(peer.package) for peer in PEERS.values()}


def _cases(peer: Peer, checkpoint: Checkpoint, scratch: Path) -> list[dict[str, Any]]:
    converted = scratch / f"{peer.package}-whole" / "model.tensors"
    if peer.convert is not None and not converted.exists():
        converted.parent.mkdir()
        peer.convert(checkpoint.folder, converted)
    cases = []
    for fault, (_, any_format) in IN_FILES.items():
        folder = scratch / f"{peer.package if peer.convert else 'safetensors'}-{fault}"
        if peer.convert is not None and not any_format:
            continue
        if not folder.exists():
            shutil.copytree(checkpoint.folder, folder)
            file, places = _file(folder), places_in(checkpoint)
            if peer.convert is not None:
                file = folder / "model.tensors"
                shutil.copyfile(converted, file)
                places = places_in_conversion(checkpoint, file)
            plant(fault, file, places)
        names = [re.escape(known) for known in (*names_of(fault, checkpoint), "model.tensors")]
        if fault is Fault.truncated_file:  # the weight that the file ends in
            names.append(re.escape(max(checkpoint.tensors, key=lambda entry: entry.end).name))
        cases.append({"fault": fault, "folder": str(folder), "names": "|".join(names)})
    if peer.offload is not None:
        away = str(scratch / f"{peer.package}-away")
        silent = {"fault": Fault.silent_offload, "folder": str(checkpoint.folder), "names": _OFFLOADED, "away": away}
        cases.append(silent)
    return cases


def _other_side(request: dict[str, Any]) -> None:
    peer = PEERS[request["peer"]]
    peer.load(Path(request["whole"]))  # what its imports say is none of a fault's
    with Path(request["output"]).open("a") as output:
        for case in request["cases"]:
            with _listened() as heard:
                error = _tried(peer, case)
            text = f"{error}\n{heard[0]}"
            has_name = re.search(case["names"], text) is not None
            word = (ERROR if has_name else UNNAMED) if error else (WARNING if has_name else SILENT)
            output.write(json.dumps({"fault": case["fault"], "noticed": word, "said": _gist(text)}) + "\n")
            output.flush()


def _tried(peer: Peer, case: dict[str, Any]) -> str:
    try:
        if "away" in case:
            assert peer.offload is not None
            peer.offload(Path(case["folder"]), Path(case["away"]))
        else:
            peer.load(Path(case["folder"]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _listened() -> Iterator[list[str]]:
    """Collect what the block writes to standard output and error, from C too; it is there after the block."""
    heard: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield heard
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            heard.append(file.read().decode(errors="replace"))


def _gist(text: str) -> str:
    """Return the first line that says something, without colours and folders."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    plain = re.sub(r"/\S*/", "", plain)
    lines = [line.strip() for line in plain.splitlines()]
    return next((line for line in lines if line and "it/s" not in line and "%|" not in line), "")[:160]


def of_folder(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`, with at least the weight that is damaged."""
    checkpoint = inspect_checkpoint(folder, "peers")
    assert any(entry.name == UP for entry in checkpoint.tensors)
    return checkpoint


if __name__ == "__main__":
    _other_side(json.loads(Path(sys.argv[1]).read_text()))
