"""The reference load that a manifest is made from: transformers' own `from_pretrained`, in a process of its own.

    python -m ladezeit.validation.manifest <request.json> <answer.json>

It loads onto the CPU. Where the weights in memory would not fit there they are loaded onto the run's GPU, because a
digest is the same on both.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.dtypes import model_item_bytes
from ladezeit.checkpoint.files import FETCH_AGAIN
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.verify import checkpoint_identity, verify
from ladezeit.errors import CheckpointError, NotRunnableError
from ladezeit.loading.quantization import TORCHAO, Scheme, quantization_config, rule_of
from ladezeit.model.tensors import named_component_tensors, state_component_tensors
from ladezeit.system.limits import available_memory_bytes
from ladezeit.system.processes import answer_request
from ladezeit.validation import reference_cache
from ladezeit.validation.checksum import ARITHMETIC
from ladezeit.validation.digest import digest_tensors
from ladezeit.validation.inventory import QUANTIZED, part_name
from ladezeit.validation.reference_cache import ReferenceKey

if TYPE_CHECKING:
    from torch import Tensor

    from ladezeit.validation.inventory import NamedTensor


#: In the cache folder.
FOLDER = "manifests"
#: Version of how parts of tensors are named: raise it when the same load would give other names.
_NAMES = 2
#: What the reference process needs besides the weights.
_PROCESS_BYTES = 1.5 * 2**30
_MOST_NAMED = 10

#: What transformers quantizes to 4 bit with, in elements that share a scale.
_BLOCK = 64
_MOST_UNSTEADY = 5


def manifest_file(subject: ReferenceKey, building: Callable[[], None] = lambda: None) -> Path:
    """Return the file of the manifest of `subject`, made where there is none for its checkpoint's files.

    `building` is called before a manifest is made, which takes as long as a load and two passes over the weights; for
    split weights some more passes, for quantized ones the quantizer's own time twice.

    Raises:
        CheckpointError: the files are not what the hub says, or the reference load is not the checkpoint's, or the
            quantizer does not repeat itself.
        NotRunnableError: the weights fit neither into host memory nor onto the device.
    """
    checkpoint = subject.checkpoint
    verify(checkpoint, subject.cache)
    place = {
        **subject.describe_place(),
        "quantization": checkpoint.config.get("quantization_config"),
        "ranks": subject.ranks,
        "arithmetic": ARITHMETIC,
        "names": _NAMES,
    }
    asked = {"place": place, "files": subject.files_identity()}

    def build() -> dict[str, Any]:
        building()
        request = {
            **subject.make_request(),
            "checkpoint": checkpoint.to_json(),
            "reference_device": _device(checkpoint, subject.dtype, subject.device, subject.name),
            "ranks": subject.ranks,
            "asked": asked,
        }
        return reference_cache.run_reference("ladezeit.validation.manifest", subject, request)

    return reference_cache.ensure_file(subject.cache / FOLDER, subject.name, asked, build)


def reference_load(folder: str, dtype: str, device: str, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return what `from_pretrained` makes of a folder on one device, and what it says about its keys.

    Raises:
        CheckpointError: it had to make up values.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # The CPU is named too: without a map bitsandbytes takes a GPU where it finds one.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        device_map={"": device},
        output_loading_info=True,
        local_files_only=True,
        **arguments,
    )
    made_up = [*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])]
    if made_up:
        raise CheckpointError(
            f"{folder} lacks {len(made_up)} tensors of its model ({', '.join(sorted(made_up)[:_MOST_NAMED])}): "
            f"transformers makes up their values, so nothing can verify them. {FETCH_AGAIN}"
        )
    return model, info


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Make the manifest in this process; returns plain data."""
    from ladezeit.validation.digest import digest_tensors
    from ladezeit.validation.inventory import group_tied, list_tensors
    from ladezeit.validation.provenance import trace_to_files

    checkpoint = Checkpoint.from_json(request["checkpoint"])
    model, info = reference_load(
        request["folder"],
        request["dtype"],
        request["reference_device"],
        trust_remote_code=request["trust_remote_code"],
    )
    held = list_tensors(model)
    grouped = group_tied(held)
    found: dict[str, str] = {}
    by_first = digest_tensors({group[0].name: group[0].tensor for group in grouped})
    for group in grouped:
        found.update({one.name: by_first[group[0].name] for one in group})
    anchors = trace_to_files(checkpoint, held, found)
    entries = {
        one.name: Entry(
            found[one.name], str(one.tensor.dtype).removeprefix("torch."), tuple(one.tensor.shape), one.kind
        )
        for one in held
    }
    split = _split(grouped, request["ranks"], _is_packed(model)) if request["ranks"] else {}
    if request["scheme"]:
        entries = _with_quantized(entries, model, request)
    if checkpoint_identity(checkpoint) != request["asked"]["files"]:
        raise CheckpointError(f"the files in {checkpoint.folder} changed while their manifest was made: try again")
    ties = [[one.name for one in group] for group in grouped if len(group) > 1]
    origin = {
        **request["asked"]["place"],
        "device": request["reference_device"],
        "dropped": sorted(info["unexpected_keys"]),
    }
    return Manifest(entries, ties, anchors.counts, anchors.unanchored, origin, split).to_plain()


# What every tensor of a checkpoint must be once it is loaded: digest, dtype, shape and ties, by name.


@dataclass(frozen=True)
class Entry:
    """What one name must hold; `kind` as in `inventory.NamedTensor`, `dtype` torch's name without ``torch.``."""

    digest: str
    dtype: str
    shape: tuple[int, ...]
    kind: str


def _with_quantized(entries: dict[str, Entry], model: Any, request: dict[str, Any]) -> dict[str, Entry]:
    """Return the entries of a plain load, with the parts that the quantizer makes of a weight in place of the weight.

    Raises:
        CheckpointError: the quantizer does not repeat itself.
    """

    made = quantized_entries(model, Scheme(**request["scheme"]), request["dtype"], request["device"])
    put: dict[str, Entry] = {}
    for name, entry in entries.items():
        put.update(made.get(name, [(name, entry)]))
    return put


def _split(grouped: "Iterable[list[NamedTensor]]", ranks: int, packed: bool) -> dict[str, dict[str, list[str]]]:
    """Return the digests of all ranks' parts of each parameter, for each way in which it may be split.

    Which of them a plan uses shows only in the load; a way that is not here is a finding there. `packed`: some tensors
    hold two projections one after the other, each of which is split.
    """
    from ladezeit.model.tensors import shard_of, shard_spec
    from ladezeit.validation.digest import digest_tensors
    from ladezeit.validation.inventory import PARAMETER

    found: dict[str, dict[str, list[str]]] = {}
    for group in grouped:
        tensor = group[0].tensor
        if group[0].kind != PARAMETER:
            continue
        groups = (1, 2) if packed and tensor.dim() > 1 else (1,)
        ways = {}
        for one in (shard_spec(dimension, count) for dimension in range(tensor.dim()) for count in groups):
            parts = digest_tensors({str(rank): shard_of(tensor, one, rank, ranks) for rank in range(ranks)})
            ways[one] = list(parts.values())
        found.update({one.name: ways for one in group})
    return found


def _is_packed(model: Any) -> bool:
    """Say whether the model's plan for tensor parallelism has weights of several projections in one."""
    plan = getattr(model, "_tp_plan", None) or {}
    return any("packed" in str(style) for style in plan.values())


def _device(checkpoint: Checkpoint, dtype: str, device: str, name: str) -> str:
    """Return where the reference is loaded: on the CPU where its weights fit, on the run's device otherwise."""
    ratio = model_item_bytes(dtype) / model_item_bytes(checkpoint.dtype)
    needed = checkpoint.weight_bytes * ratio + _PROCESS_BYTES
    available = available_memory_bytes()
    if needed <= available:
        return "cpu"
    if device != "cpu":
        return device
    raise NotRunnableError(
        f"model={name}: the reference load that its content is verified against needs {needed / 2**30:.1f} GiB of host "
        f"memory, {available / 2**30:.1f} GiB are available: use validation=placement, or loading.dtype=auto"
    )


@dataclass(frozen=True)
class Manifest:
    """The tensors of a model by name, the groups of names that are one tensor, and what this rests on.

    `anchored` counts how the reference load was itself verified against the files (see `provenance`), `unanchored` has
    the parameters and persistent buffers that could not be; `origin` says what it was made from and with. Where weights
    are split over ranks, `split` has by name and way (see `ladezeit.model.tensors`) the digest of each rank's part.
    """

    tensors: dict[str, Entry]
    ties: list[list[str]]
    anchored: dict[str, int]
    unanchored: list[str]
    origin: dict[str, Any] = field(default_factory=dict)
    split: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`; a tensor is a list, which keeps thousands of them cheap."""
        plain = asdict(self)
        plain["tensors"] = {name: [e.digest, e.dtype, e.shape, e.kind] for name, e in self.tensors.items()}
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Manifest":
        """Rebuild what `to_plain` returned; raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        tensors = {
            str(name): Entry(str(digest), str(dtype), tuple(map(int, shape)), str(kind))
            for name, (digest, dtype, shape, kind) in plain["tensors"].items()
        }
        return cls(**{**plain, "tensors": tensors})


def read_manifest(path: Path) -> Manifest:
    """Read a manifest file; raises `CheckpointError` where it is not there, or damaged."""
    try:
        return Manifest.from_plain(reference_cache.read_file(path))
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{path} is no manifest: {cause!r}. Remove it, and it is made again") from cause


# What the library's own quantizer makes of weights that are verified already: the measure for quantized loads.


def quantized_names(model: Any, scheme: Scheme, dtype: str) -> list[str]:
    """Return the names of the weights of a plain `model` that the scheme's quantizer takes, by its own list."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization_config(scheme, dtype), pre_quantized=False)
    left_out = quantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    quantizer.modules_to_not_convert = left_out
    takes = rule_of(quantizer)
    return [f"{path}.weight" for path, module in model.named_modules() if takes(path, module)]


def quantized_entries(model: Any, scheme: Scheme, dtype: str, device: str) -> dict[str, list[tuple[str, Entry]]]:
    """Return what each weight that is taken must consist of: the entries of its parts with their names.

    Args:
        model: a plain one, verified; its weights are of `dtype`.
        scheme: what is asked for.
        dtype: torch's name.
        device: where the load quantizes; another device's kernels may round differently.

    Raises:
        CheckpointError: the library makes something else of the same weight the second time.
    """
    made = {}
    unsteady = []
    for name in quantized_names(model, scheme, dtype):
        weight = _as_linear(model, name)
        parts = quantize_weight(weight, scheme, device)
        found = digest_tensors(parts)
        if digest_tensors(quantize_weight(weight, scheme, device)) != found:
            unsteady.append(name)
        made[name] = [
            (part_name(name, part), Entry(found[part], _dtype(tensor), tuple(tensor.shape), QUANTIZED))
            for part, tensor in parts.items()
        ]
    if unsteady:
        raise CheckpointError(
            f"{scheme.library} makes other codes of the same weight each time ({len(unsteady)} of {len(made)}: "
            f"{', '.join(unsteady[:_MOST_UNSTEADY])}): nothing to verify their content against. Use validation=logits, "
            f"which measures how far two loads are apart"
        )
    return made


def quantize_weight(weight: "Tensor", scheme: Scheme, device: str) -> "dict[str, Tensor]":
    """Return the parts that the library makes of a weight (rows by columns), by their names in
    `named_component_tensors`.
    """
    import torch

    here = weight.detach().to(device).contiguous()
    if scheme.library == TORCHAO:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = torch.nn.Linear(here.shape[1], here.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(here, requires_grad=False)
        quantize_(linear, Int8WeightOnlyConfig())
        return dict(named_component_tensors(linear.weight))
    from bitsandbytes import functional

    if scheme.bits == 8:
        codes, scales, _ = functional.int8_vectorwise_quant(here.to(torch.float16))
        return {"": codes, "SCB": scales}
    codes, state = functional.quantize_4bit(
        here, blocksize=_BLOCK, compress_statistics=scheme.double, quant_type=scheme.quant_type
    )
    return {"": codes, **dict(state_component_tensors(state))}


def _as_linear(model: Any, name: str) -> "Tensor":
    """Return a weight as a linear layer has it; GPT-2's own class keeps it the other way round."""
    from transformers.pytorch_utils import Conv1D

    weight: Tensor = model.get_parameter(name)
    return weight.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else weight


def _dtype(tensor: "Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(answer_request(make, sys.argv[1:]))
