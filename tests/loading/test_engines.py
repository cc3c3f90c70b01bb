"""The engines that others wrote bring the checkpoint's very bits, say what they did, and refuse what cannot be."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs_for_tests import TINY_MOE, model_config
from ladezeit.checkpoint.resolve import Checkpoint, inspect_checkpoint, prepare_checkpoint
from ladezeit.config import DType, LoadingConfig
from ladezeit.config.engines import arguments_class
from ladezeit.config.rules import check_combination
from ladezeit.errors import CombinationError, LoadError, NotRunnableError
from ladezeit.loading import registry
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.loading.build_model import StateDictEngine
from ladezeit.loading.conversion import conversion_for
from ladezeit.loading.engines.accelerate import AccelerateLoading
from ladezeit.loading.engines.safetensors import OneThreadLoading
from ladezeit.system.files import cache_folder
from ladezeit.timing.clock import LOAD, Clock

CONF = Path(__file__).parents[2] / "conf" / "loading"
TENSOR_ENGINES = [name for name, spec in registry.engine_specs().items() if spec.yields_tensors and name != "streamed"]
ON_CPU = [name for name in TENSOR_ENGINES if "cpu" in registry.engine_specs()[name].devices]
CUDA_ONLY = [name for name in TENSOR_ENGINES if name not in ON_CPU]
KINDS = ("one shard", "shards", "mixed dtypes")
WITH_PACKAGE = {
    "fastsafetensors": "fastsafetensors",
    "runai_streamer": "runai_model_streamer",
    "instanttensor": "instanttensor",
    "tensorizer": "tensorizer",
    "gguf": "gguf",
    "bitsandbytes_8bit": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "torchao_int8": "torchao",
}
#: Engines that build the model themselves, beside `transformers` and its kin.
BUILDERS = ["accelerate", "gguf"]


@pytest.fixture(scope="module")
def checkpoints(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    one, several = model_config("tiny"), model_config("tiny")
    several.name, several.shard_bytes = "tiny-shards", 500_000
    return {
        "one shard": prepare_checkpoint(one, cache),
        "shards": prepare_checkpoint(several, cache),
        "mixed dtypes": mixed(tmp_path_factory.mktemp("mixed")),
    }


def mixed(folder: Path) -> Checkpoint:
    """Two shards of every element size, with a scalar, a tensor of odd length, and one that crosses 4 KiB pages."""
    generator = torch.Generator().manual_seed(0)
    bits = {size: torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in (10, 30_000)}
    shards: dict[str, dict[str, Any]] = {
        "model-00001-of-00002.safetensors": {
            "double": torch.randn(3, 5, dtype=torch.float64, generator=generator),
            "single": bits[30_000].clone().view(torch.float32).view(75, 100),
            "count": torch.arange(7),
            "scalar": torch.tensor(1.5),
            "odd": bits[10][:7].clone(),
        },
        "model-00002-of-00002.safetensors": {
            "half": bits[30_000].clone().view(torch.float16).view(3, 5000),
            "brain": bits[30_000].flip(0).clone().view(torch.bfloat16),
            "flags": bits[10] > 99,
            "small": bits[10].clone().view(torch.float8_e4m3fn),
        },
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "bfloat16"}))
    return inspect_checkpoint(folder, "mixed")


def request_of(name: str, checkpoint: Checkpoint, scratch: Path, device: str = "cpu", **arguments: Any) -> LoadRequest:
    loading: LoadingConfig = arguments_class(name)(name=name, engine=name, **arguments)
    made = conversion_for(name, checkpoint, "test", cache_folder(), lambda *_: None)
    return LoadRequest(checkpoint, loading, device, scratch, conversion=made)


def tensors_of(request: LoadRequest) -> Any:
    """Return the engine's context, as the assembling side enters it."""
    registry.check_engine(request.loading.engine, request.device, request.checkpoint.file_format)
    wrapped = registry.make_engine(request.loading.engine)
    assert isinstance(wrapped, StateDictEngine)
    engine = wrapped._engine
    engine.prepare(request)
    return engine.open(request, Clock(time.monotonic_ns()))


def load(request: LoadRequest) -> EngineModel:
    engine = registry.make_engine(request.loading.engine)
    engine.prepare(request)
    clock = Clock(time.monotonic_ns())
    with clock.span(LOAD):
        return engine.load(request, clock)


def bits_of(tensor: Any) -> bytes:
    whole: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return whole


def assert_same_bits(tensors: dict[str, Any], checkpoint: Checkpoint) -> None:
    reference = {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard).items()}
    assert tensors.keys() == reference.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (reference[name].dtype, reference[name].shape), name
        assert bits_of(tensor) == bits_of(reference[name]), name


def reuse_memory(device: str) -> list[Any]:
    """Take and overwrite memory of many sizes, so that whatever was freed too early holds other bits now."""
    sizes = [2**power for power in range(10, 23)]
    return [torch.full((size,), 0xA5, dtype=torch.uint8, device=device) for size in sizes for _ in range(6)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ON_CPU)
def test_the_tensors_are_the_files_bits(
    name: str, kind: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Whatever engine a user picks, the weights are the published ones; also after its buffers were given back."""
    checkpoint = checkpoints[kind]
    with tensors_of(request_of(name, checkpoint, tmp_path)) as loaded:
        assert_same_bits(loaded.tensors, checkpoint)
        assert loaded.effective["engine"].split()[-1], "which version it was"
        kept = {key: tensor.clone() if loaded.borrowed else tensor for key, tensor in loaded.tensors.items()}
    gc.collect()
    poison = reuse_memory("cpu")
    assert_same_bits(kept, checkpoint)
    del poison


@pytest.mark.parametrize("name", ON_CPU)
def test_no_descriptor_stays_open(name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """A service that loads and unloads models for weeks does not run out of files."""

    def loads(times: int) -> int:
        for _ in range(times):
            with tensors_of(request_of(name, checkpoints["shards"], tmp_path)) as loaded:
                del loaded
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = loads(1)  # what a library keeps for the process is open by now
    assert loads(3) <= before


@pytest.mark.parametrize("kind", ["one shard", "shards"])
@pytest.mark.parametrize("name", [*ON_CPU, *BUILDERS])
def test_the_model_equals_from_pretrained(
    name: str, kind: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """A user who changes the engine gets the same model: weights, buffers, ties, generation config, logits."""
    checkpoint = checkpoints[kind]
    ours = load(request_of(name, checkpoint, tmp_path)).model
    poison = reuse_memory("cpu")
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, device_map="cpu")
    assert type(ours) is type(theirs) and not ours.training
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(mine[key].dtype == other[key].dtype and bits_of(mine[key]) == bits_of(other[key]) for key in mine)
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(tensor, buffers[key]) for key, tensor in ours.named_buffers())
    assert ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path == ours.config.name_or_path
    ids = torch.tensor([[1, 2, 3, 5]])
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    del poison


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_an_engine_for_gpus_alone_is_refused_on_the_cpu(name: str) -> None:
    """A sweep skips the point by name in place of a stack trace from inside a library."""
    with pytest.raises(NotRunnableError, match=rf"loading\.engine={name} needs CUDA: the run is on cpu\. Use"):
        registry.check_engine(name, "cpu", "safetensors")


@pytest.mark.parametrize(("name", "package"), WITH_PACKAGE.items())
def test_a_package_that_is_not_installed_is_named_with_its_cure(name: str, package: str) -> None:
    """Nobody has to guess what to install; and finding out imports neither the package nor torch."""
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from ladezeit.errors import NotRunnableError\nfrom ladezeit.loading import registry\n"
        f"try: registry.check_engine({name!r}, 'cuda:0', 'safetensors')\n"
        "except NotRunnableError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert f"needs {package}, not installed: pip install 'ladezeit[engines]'" in shown.stdout


@pytest.mark.skipif(Version(version("safetensors")) >= Version("0.9.0rc1"), reason="prefetch is there")
def test_prefetch_asks_for_the_version_that_has_it() -> None:
    with pytest.raises(NotRunnableError, match=r"safetensors>=0\.9\.0rc1: .* is installed\. pip install --pre"):
        registry.check_engine("safetensors_prefetch", "cuda:0", "safetensors")


@pytest.mark.skipif(Path("/dev/nvidia-fs0").exists(), reason="GPUDirect Storage is there")
def test_gds_without_its_driver_is_refused_not_replaced() -> None:
    """fastsafetensors would fall back with a warning, and the result would be labelled with what did not happen."""
    with pytest.raises(NotRunnableError, match="/dev/nvidia-fs0"):
        registry.check_engine("fastsafetensors_gds", "cuda:0", "safetensors")


def test_a_library_that_an_engine_asks_the_system_for_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch came from pip alone, fastsafetensors fails on every GPU: a sweep skips it and says what to do."""
    pytest.importorskip("fastsafetensors")
    entry = registry.engine_specs()["fastsafetensors"]
    assert entry.cuda_library == "libcudart.so"
    monkeypatch.setitem(registry.engine_specs(), "fastsafetensors", replace(entry, cuda_library="libm.so.6"))
    registry.check_engine("fastsafetensors", "cuda:0", "safetensors")
    monkeypatch.setitem(registry.engine_specs(), "fastsafetensors", replace(entry, cuda_library="libnowhere.so"))
    with pytest.raises(NotRunnableError, match=r"libnowhere\.so, which is not found\. Install the CUDA toolkit"):
        registry.check_engine("fastsafetensors", "cuda:0", "safetensors")
    registry.check_engine("fastsafetensors", "cpu", "safetensors")


@pytest.mark.parametrize("name", [*TENSOR_ENGINES, *BUILDERS])
def test_a_pickled_checkpoint_is_refused(name: str) -> None:
    with pytest.raises(NotRunnableError, match="reads safetensors: the checkpoint is pickle"):
        registry.check_engine(name, "cuda:0" if name in CUDA_ONLY else "cpu", "pickle")


@pytest.mark.parametrize("option", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_option_names_an_engine_that_there_is(option: Path) -> None:
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.load(option)
    schema = str(plain.defaults[0]).removeprefix("/schema/loading/").partition("@")[0]
    engine = plain.get("engine", arguments_class(schema)().engine)
    assert engine in registry.engine_specs()
    assert schema == engine


def mapped(checkpoint: Checkpoint) -> bool:
    """Return whether this process has a shard of `checkpoint` mapped."""
    maps = Path("/proc/self/maps").read_text()
    return any(str(shard.resolve()) in maps for shard in checkpoint.shards)


@pytest.mark.parametrize(("name", "backend"), [("safetensors_mmap", "mmap"), ("safetensors_pread", "pread")])
def test_the_backend_is_the_one_in_the_result(
    name: str, backend: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """A result labelled `pread` was not mapped: the comparison of the two is one of what it says."""
    gc.collect()
    with tensors_of(request_of(name, checkpoints["shards"], tmp_path)) as loaded:
        assert loaded.effective["backend"] == backend
        assert mapped(checkpoints["shards"]) == (backend == "mmap")


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("fastsafetensors", {"threads": 2, "buffer_bytes": 2**20, "direct": False}, {"threads": 2, "direct_io": False}),
        ("runai_streamer", {"threads": 3, "buffer_bytes": 4_000_000}, {"threads": 3}),
        ("torch_dcp", {"threads": 2}, {"threads": 2}),
        ("tensorizer", {"threads": 3, "verify_hash": True}, {"threads": 3, "verify_hash": True}),
    ],
)
def test_arguments_are_used_told_and_leave_nothing_behind(
    name: str, arguments: dict[str, Any], told: dict[str, Any], checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """What was set for one load does not change the next one in the same process."""
    before = dict(os.environ)
    with tensors_of(request_of(name, checkpoints["shards"], tmp_path, **arguments)) as loaded:
        assert_same_bits(loaded.tensors, checkpoints["shards"])
        assert told.items() <= loaded.effective.items()
    assert dict(os.environ) == before


def test_a_reader_that_loses_a_tensor_is_found_out(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that skips a tensor must not end in a model with random numbers."""
    from runai_model_streamer import SafetensorsStreamer

    whole: Callable[[Any], Any] = SafetensorsStreamer.get_tensors
    monkeypatch.setattr(
        SafetensorsStreamer, "get_tensors", lambda self: (pair for pair in whole(self) if "layers.1.mlp" not in pair[0])
    )
    with (
        pytest.raises(LoadError, match=r"3 tensors are missing: model\.layers\.1\.mlp\.down_proj\.weight"),
        tensors_of(request_of("runai_streamer", checkpoints["one shard"], tmp_path)),
    ):
        pass


def test_dcp_refuses_a_folder_with_other_weights(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Its reader takes every .safetensors file of a folder: an adapter beside the weights would be mixed in."""
    folder = shutil.copytree(checkpoints["one shard"].folder, tmp_path / "model")
    save_file({"adapter": torch.zeros(1)}, folder / "adapter.safetensors")
    with pytest.raises(LoadError, match=r"adapter\.safetensors besides the checkpoint's own"):
        tensors_of(request_of("torch_dcp", inspect_checkpoint(folder, "own"), tmp_path))


def test_dcp_says_what_really_went_wrong(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Its library wraps any error in one that is no `Exception`: a sample would end without a result."""
    folder = shutil.copytree(checkpoints["one shard"].folder, tmp_path / "model")
    checkpoint = inspect_checkpoint(folder, "own")
    (shard,) = checkpoint.shards
    shard.write_bytes(shard.read_bytes().replace(b"model.norm.weight", b"model.gone.weight"))
    with pytest.raises(RuntimeError, match=r"[Mm]issing key.*model\.norm\.weight"):
        tensors_of(request_of("torch_dcp", checkpoint, tmp_path)).__enter__()


def test_accelerate_refuses_experts_that_were_not_merged(cache: Path, tmp_path: Path) -> None:
    """accelerate alone would leave every expert on `meta`, log a line and call it a success."""
    model = model_config("tiny")
    model.name, model.architecture = "tiny-moe", TINY_MOE
    with pytest.raises(LoadError, match=r"missing: .*experts.*Use loading=transformers"):
        load(replace(request_of("accelerate", prepare_checkpoint(model, cache), tmp_path), conversion=None))


def test_accelerate_places_by_a_strategy_and_converts(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """A strategy that fits is resolved and told; the dtype is the one that was asked for."""
    request = request_of("accelerate", checkpoints["shards"], tmp_path, device_map="auto", dtype=DType.float32)
    loaded = load(request)
    assert set((loaded.device_map or {}).values()) == {"cpu"}
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoints["shards"].folder, dtype="float32")
    mine, other = loaded.model.state_dict(), theirs.state_dict()
    assert all(mine[key].dtype == other[key].dtype and bits_of(mine[key]) == bits_of(other[key]) for key in other)


def test_accelerate_offloads_nothing_unasked(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    """A model that does not fit is an error that names the modules, not one with its weights on the disk."""
    arguments = {"device_map": "auto", "max_memory": {"cpu": "2200KB"}}
    with pytest.raises(LoadError, match=r"modules were offloaded .*disable_cpu_offload"):
        load(request_of("accelerate", checkpoints["one shard"], tmp_path, **arguments))


@pytest.mark.parametrize(
    "loading",
    [
        OneThreadLoading(name="x", engine="safetensors_mmap", threads=4),
        AccelerateLoading(name="x", disable_mmap=True),
        AccelerateLoading(name="x", device_map=None),
    ],
)
def test_an_argument_without_effect_is_refused(loading: LoadingConfig, tmp_path: Path) -> None:
    """Measured with it, a user would believe that it did something."""
    from configs_for_tests import make_run_config

    with pytest.raises(CombinationError, match=r"loading\."):
        check_combination(make_run_config(tmp_path, loading=loading))


@pytest.mark.parametrize("asked", [None, False, True])
def test_the_loaders_threads_are_switched(
    asked: bool | None, checkpoints: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformers_sync` measures a load without threads, and the next load has them again."""
    from transformers import core_model_loading

    pools: list[Any] = []
    executor = core_model_loading.ThreadPoolExecutor

    def counted(*args: Any, **kwargs: Any) -> Any:
        pools.append(executor(*args, **kwargs))
        return pools[-1]

    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", counted)
    before = dict(os.environ)
    load(request_of("transformers", checkpoints["one shard"], tmp_path, device_map="cpu", async_load=asked))
    assert bool(pools) == (asked is not False)
    assert dict(os.environ) == before


@pytest.mark.parametrize("asked", [False, True])
def test_disable_mmap_maps_nothing(asked: bool, checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    gc.collect()
    request = request_of("transformers", checkpoints["shards"], tmp_path, device_map="cpu", disable_mmap=asked)
    loaded = load(request)
    assert mapped(checkpoints["shards"]) == (not asked)
    assert loaded.effective["arguments"]["disable_mmap"] is asked


def test_an_older_transformers_is_asked_before_it_is_called(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check the argument ends up in the model's constructor, and the error there explains nothing."""
    import transformers

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(lambda cls, name: None))
    with pytest.raises(NotRunnableError, match=r"loading\.disable_mmap .* pip install -U transformers"):
        load(request_of("transformers", checkpoints["one shard"], tmp_path, disable_mmap=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TENSOR_ENGINES)
def test_the_tensors_on_a_gpu_are_the_files_bits(
    name: str, kind: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """The same promise on the GPU, also after the engine's device buffers were given back and used again."""
    try:
        registry.check_engine(name, "cuda:0", "safetensors")
    except NotRunnableError as error:
        pytest.skip(str(error))
    checkpoint = checkpoints[kind]
    with tensors_of(request_of(name, checkpoint, tmp_path, "cuda:0")) as loaded:
        assert all(tensor.device == torch.device("cuda:0") for tensor in loaded.tensors.values())
        kept = {key: tensor.clone() if loaded.borrowed else tensor for key, tensor in loaded.tensors.items()}
    torch.cuda.synchronize()
    poison = reuse_memory("cuda:0")
    assert_same_bits(kept, checkpoint)
    del poison


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("name", [*TENSOR_ENGINES, *BUILDERS])
def test_the_model_on_a_gpu_equals_from_pretrained(
    name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    try:
        registry.check_engine(name, "cuda:0", "safetensors")
    except NotRunnableError as error:
        pytest.skip(str(error))
    checkpoint = checkpoints["shards"]
    ours = load(request_of(name, checkpoint, tmp_path, "cuda:0")).model
    poison = reuse_memory("cuda:0")
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, device_map="cuda:0")
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(tensor.is_cuda for tensor in mine.values())
    assert all(bits_of(mine[key]) == bits_of(other[key]) for key in mine)
    ids = torch.tensor([[1, 2, 3, 5]], device="cuda:0")
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    del poison
