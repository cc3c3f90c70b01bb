"""Placement over device, host memory and disk through accelerate's real hooks: allowed, it works; unasked, it fails."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import DType, TransformersLoading, ValidationConfig, ValidationLevel
from ladezeit.config.device_map import offload_folder, single_device
from ladezeit.config.engines import arguments_class
from ladezeit.errors import ConfigError, LoadError
from ladezeit.loading import device_map, registry
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.timing.clock import LOAD, Clock
from ladezeit.validation.expected import Expected
from ladezeit.validation.levels import verify_model
from ladezeit.validation.placement import offloaded_bytes
from ladezeit.validation.verification import Finding, Verification

LAYERS_ON_DISK = {
    "model.embed_tokens": "device",
    "lm_head": "device",
    "model.rotary_emb": "device",
    "model.layers": "disk",
    "model.norm": "device",
}
#: What the embedding and two of the four layers of model=tiny need, in bytes.
SMALL_BUDGET = {"device": "3500000"}


def request_of(checkpoint: Checkpoint, scratch: Path, device: str = "cpu", **arguments: Any) -> LoadRequest:
    engine = arguments.pop("engine", "transformers")
    loading = arguments_class(engine)(name=engine, **arguments)
    return LoadRequest(checkpoint, loading, device, scratch)


def load(request: LoadRequest) -> EngineModel:
    engine = registry.make_engine(request.loading.engine)
    engine.prepare(request)
    clock = Clock(time.monotonic_ns())
    with clock.span(LOAD):
        return engine.load(request, clock)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([[1, 2, 3]], device=model.get_input_embeddings().weight.device)).logits
    return found.float().cpu()


def hooked(model: Any) -> list[str]:
    """Names of the modules whose weights accelerate's own hook brings in for a forward."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook) and module._hf_hook.offload
    ]


def proof(loaded: EngineModel, loading: TransformersLoading, allowed: bool, device: str = "cpu") -> Verification:
    dtype = "bfloat16" if loading.dtype is DType.auto else loading.dtype.value
    single = single_device(loading)
    asked = Expected(device, dtype, single, offload_allowed=allowed)
    return verify_model(loaded, asked, ValidationConfig(ValidationLevel.placement), Clock(time.monotonic_ns()))


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("transformers", DType.auto), ("transformers", DType.float32), ("accelerate", DType.auto)],
)
def test_layers_on_disk_say_the_same_as_layers_in_memory(
    tiny: Checkpoint, tmp_path: Path, engine: str, dtype: DType
) -> None:
    """An allowed offload is slow and right: the layers hang on accelerate's hooks, and the logits are equal."""
    arguments = {"engine": engine, "dtype": dtype, "disable_cpu_offload": False}
    request = request_of(tiny, tmp_path, device_map=LAYERS_ON_DISK, **arguments)
    loaded = load(request)
    assert hooked(loaded.model)
    assert all(name.startswith("model.layers.") for name in hooked(loaded.model))
    plain = load(request_of(tiny, tmp_path, device_map="device", engine=engine, dtype=dtype))
    assert not hooked(plain.model)
    assert torch.equal(logits(loaded.model), logits(plain.model))
    layers = sum(p.numel() * p.element_size() for p in plain.model.model.layers.parameters())
    assert offloaded_bytes(loaded) == {"disk": layers}
    assert offloaded_bytes(plain) == {}


def test_accelerate_does_not_pass_unconverted_weights_off_as_converted(tiny: Checkpoint, tmp_path: Path) -> None:
    """Its disk offload keeps the file's dtype while the model says float32: other results, and no sign of it."""
    arguments: dict[str, Any] = {"device_map": LAYERS_ON_DISK, "disable_cpu_offload": False, "dtype": DType.float32}
    with pytest.raises(LoadError, match=r"on the disk as bfloat16.*loading=offload_disk"):
        load(request_of(tiny, tmp_path, engine="accelerate", **arguments))


def test_what_exceeds_the_budget_goes_to_the_disk_where_that_is_allowed(tiny: Checkpoint, tmp_path: Path) -> None:
    """`auto` within `max_memory` fills the device first; the proof says how much of the model is elsewhere."""
    arguments = {"device_map": "auto", "max_memory": SMALL_BUDGET, "disable_cpu_offload": False}
    request = request_of(tiny, tmp_path, **arguments)
    loaded = load(request)
    assert loaded.device_map is not None
    assert set(loaded.device_map.values()) == {"cpu", "disk"}
    held = sum(p.numel() * p.element_size() for p in loaded.model.parameters() if not p.is_meta)
    assert 0 < held <= 3_500_000
    assert torch.equal(logits(loaded.model), logits(load(request_of(tiny, tmp_path, device_map="device")).model))
    assert isinstance(request.loading, TransformersLoading)
    allowed = proof(loaded, request.loading, allowed=True)
    assert allowed.passed
    assert "offloaded as allowed" in allowed.reason
    unasked = proof(loaded, request.loading, allowed=False)
    assert {finding.kind for finding in unasked.findings} == {"offload"}
    assert Finding("offload", "model.layers.3", "was placed on disk, which was not asked for") in unasked.findings


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential"])
@pytest.mark.parametrize("engine", ["transformers", "accelerate"])
@pytest.mark.parametrize("dtype", [DType.auto, DType.float32])
def test_what_exceeds_the_budget_is_an_error_where_it_is_not(
    tiny: Checkpoint, tmp_path: Path, strategy: str, engine: str, dtype: DType
) -> None:
    """The origin's rule for every strategy: the modules that do not fit are named, and there is no model."""
    arguments = {"engine": engine, "device_map": strategy, "max_memory": SMALL_BUDGET, "dtype": dtype}
    with pytest.raises(LoadError, match=r"modules were offloaded \(.*model.*disable_cpu_offload=false"):
        load(request_of(tiny, tmp_path, **arguments))


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_strategy_that_needs_no_offload_is_the_plain_load(tiny: Checkpoint, tmp_path: Path, strategy: str) -> None:
    """On one device every strategy comes to the same model, without a hook between a caller and its layers."""
    loaded = load(request_of(tiny, tmp_path, device_map=strategy))
    assert not hooked(loaded.model)
    assert offloaded_bytes(loaded) == {}


@pytest.mark.parametrize("engine", ["transformers", "accelerate"])
@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({**LAYERS_ON_DISK, "modle.norm": "cpu"}, r"names 'modle\.norm'.*no such module.*'model\.norm'"),
        ({"model.embed_tokens": "cpu", "model.layers": "disk"}, r"no place to 2 parameters \(.*model\.norm\.weight"),
    ],
)
def test_a_mapping_that_does_not_fit_the_model_is_named(
    tiny: Checkpoint, tmp_path: Path, engine: str, mapping: dict[str, str], said: str
) -> None:
    """A misspelt module would be placed anywhere, with a warning that nobody reads."""
    with pytest.raises(ConfigError, match=said):
        load(request_of(tiny, tmp_path, engine=engine, device_map=mapping, disable_cpu_offload=False))


def test_each_sample_offloads_to_a_folder_of_its_own(tmp_path: Path) -> None:
    """Removing it after the sample takes nothing of the user's, and nothing of another sample's."""
    own = TransformersLoading(name="x", offload_folder=str(tmp_path / "fast"))
    folders = {offload_folder(own, tmp_path / sample / "scratch") for sample in "ab"}
    assert len(folders) == 2
    assert all(folder.parent == tmp_path / "fast" for folder in folders)
    by_default = offload_folder(TransformersLoading(name="x"), tmp_path / "a" / "scratch")
    assert by_default.is_relative_to(tmp_path / "a" / "scratch")


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["transformers", "accelerate"])
def test_a_budget_splits_one_gpu_and_host_memory(tiny: Checkpoint, tmp_path: Path, engine: str) -> None:
    """On one GPU with an artificial budget `auto` goes on in host memory where allowed, and nowhere where not."""
    arguments: dict[str, Any] = {"engine": engine, "device_map": "auto"}
    arguments["max_memory"] = {**SMALL_BUDGET, "cpu": "1GiB"}
    request = request_of(tiny, tmp_path, "cuda:0", disable_cpu_offload=False, **arguments)
    loaded = load(request)
    assert loaded.device_map is not None
    assert set(loaded.device_map.values()) == {"cuda:0", "cpu"}
    assert hooked(loaded.model)
    assert offloaded_bytes(loaded)["cpu"] > 0
    assert isinstance(request.loading, TransformersLoading)
    assert proof(loaded, request.loading, allowed=True, device="cuda:0").passed
    plain = load(request_of(tiny, tmp_path, "cuda:0", device_map="device"))
    assert torch.equal(logits(loaded.model), logits(plain.model))
    with pytest.raises(LoadError, match="modules were offloaded"):
        load(request_of(tiny, tmp_path, "cuda:0", **arguments))


@pytest.mark.gpu
def test_layers_in_host_memory_by_a_mapping(tiny: Checkpoint, tmp_path: Path) -> None:
    """loading=offload_cpu: computed on the GPU, kept in host memory, equal to the plain load."""
    mapping = {**LAYERS_ON_DISK, "model.layers": "cpu"}
    loaded = load(request_of(tiny, tmp_path, "cuda:0", device_map=mapping, disable_cpu_offload=False))
    assert set(offloaded_bytes(loaded)) == {"cpu"}
    plain = load(request_of(tiny, tmp_path, "cuda:0", device_map="device"))
    assert torch.equal(logits(loaded.model), logits(plain.model))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("budget", [{}, {"0": "3500000", "1": "1GiB"}])
@pytest.mark.parametrize("strategy", ["balanced", "sequential"])
def test_strategies_over_two_gpus(tiny: Checkpoint, tmp_path: Path, strategy: str, budget: dict[str, str]) -> None:
    """`balanced` uses both; `sequential` the second only when the first is full."""
    loaded = load(request_of(tiny, tmp_path, "cuda:0", device_map=strategy, max_memory=budget))
    used = {str(parameter.device) for parameter in loaded.model.parameters()}
    assert used == ({"cuda:0"} if strategy == "sequential" and not budget else {"cuda:0", "cuda:1"})
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())


def test_a_run_on_the_cpu_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy takes every GPU that it finds, so with device=cpu it is given host memory alone; elsewhere nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    auto = TransformersLoading(name="x", device_map="auto")
    assert list(device_map.max_memory(auto, "cpu") or {}) == ["cpu"]
    assert device_map.max_memory(auto, "cuda:0") is None
    assert device_map.max_memory(TransformersLoading(name="x", device_map="device"), "cpu") is None
