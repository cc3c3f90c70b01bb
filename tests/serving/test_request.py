"""What `ladezeit.load` is asked for is found, checked, and refused in words before a weight is read."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import modeling_utils

import ladezeit
from configs_for_tests import model_config
from engines_for_tests import FlipsABit, ForgetsTheHead
from ladezeit.config import FolderModel, HubModel, TransformersLoading
from ladezeit.errors import CheckpointError, CombinationError, ConfigError, LoadError, NotRunnableError
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.serving.request import model_of
from ladezeit.timing.clock import Clock
from ladezeit.validation.verification import ValidationError
from sparse_checkpoints import four_terabytes


def load(**arguments: Any) -> Any:
    return ladezeit.load(**{"model": "tiny", "device": "cpu", **arguments})


def test_a_program_that_loads_needs_neither_hydra_nor_mlflow() -> None:
    """A service starts without the machinery of sweeps, and ``import ladezeit`` alone without torch."""
    names = ("hydra", "mlflow", "typer", "matplotlib", "scipy.stats")
    said = f"print(sorted(name for name in {names} if name in sys.modules))\n"
    code = (
        "import sys, ladezeit\n"
        "heavy = ('torch', 'transformers', 'hydra', 'mlflow', 'omegaconf', 'numpy')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        "assert {'load', 'LoadedModel', 'prefetch', 'evict'} <= set(dir(ladezeit))\n"
        "ladezeit.load('tiny', device='cpu')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code + said], capture_output=True, text=True, check=False)
    # What the library imports by itself beside a package that happens to be installed is not ours.
    theirs = "import sys\nfrom transformers import GenerationConfig, Qwen2ForCausalLM\n"
    library = subprocess.run([sys.executable, "-c", theirs + said], capture_output=True, text=True, check=True)
    assert (ended.returncode, ended.stdout) == (0, library.stdout), ended.stderr
    assert "hydra" not in ended.stdout and "mlflow" not in ended.stdout


def test_phases_add_up_and_the_record_is_whole(tiny: Any) -> None:
    """Where the time of a start went is known to the service too."""
    told: list[tuple[str, int, int]] = []
    loaded = load(progress=lambda *state: told.append(state))
    outermost = [phase for phase in loaded.phases if "/" not in phase.path]
    assert {"checkpoint", "import", "prepare", "load", "validation"} <= {phase.path for phase in outermost}
    explained = sum(phase.duration_s for phase in outermost)
    assert explained == pytest.approx(sum(phase.self_s for phase in loaded.phases))
    assert loaded.load_s < explained <= loaded.total_s
    assert 0 < loaded.load_s < loaded.total_s
    assert loaded.chosen_by == "auto" and loaded.effective["auto"]["engine"] == "streamed"
    assert (loaded.effective["device"], loaded.effective["dtype"]) == ("cpu", "bfloat16")
    assert loaded.checkpoint.folder == tiny.folder and loaded.tokenizer is None
    assert ("load/read", tiny.file_bytes, tiny.file_bytes) in told or "load/read" in {what for what, _, _ in told}
    assert "tiny by auto on cpu" in repr(loaded)


def test_models_are_named_in_three_ways(tiny: Any, tmp_path: Path) -> None:
    """A configured name, a folder, a hub id; a user's own options beside ours."""
    assert model_of("smollm2-135m").name == "smollm2-135m"
    assert model_of(tiny.folder) == model_of(str(tiny.folder)) == FolderModel(tiny.folder.name, path=str(tiny.folder))
    assert model_of("org/name@0123abc") == HubModel("name", repo_id="org/name", revision="0123abc")
    assert model_of("org/name") == HubModel("name", repo_id="org/name", revision="main")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("defaults: [tiny, _self_]\nname: ours\nseed: 7\n")
    ours: Any = model_of("ours", tmp_path)
    assert (ours.name, ours.seed, ours.architecture) == ("ours", 7, model_config("tiny").architecture)
    assert load(model=tiny.folder).verification.passed


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        ({"model": "tinny"}, ConfigError, "Did you mean 'tiny'"),
        ({"model": "./nowhere"}, CheckpointError, "does not exist"),
        ({"loading": "streemed"}, ConfigError, "Did you mean 'streamed'"),
        ({"loading": {"engine": "streemed"}}, ConfigError, "Did you mean 'streamed'"),
        ({"loading": {"engine": "streamed", "thread": 2}}, ConfigError, "Did you mean 'threads'"),
        ({"loading": {"dtype": "float17"}}, ConfigError, "float17"),
        ({"loading": {"engine": "streamed", "threads": 0}}, ConfigError, "the least is 1"),
        ({"validation": "contents"}, ConfigError, "Did you mean 'content'"),
        ({"device": "gpu"}, ConfigError, "is not a device"),
        ({"profile": "/nowhere/profile.yaml"}, ConfigError, "cannot be read"),
        ({"config_dir": "/nowhere"}, ConfigError, "is no folder"),
        ({"max_memory": {"cpu": "1GiB"}}, CombinationError, "device_map_auto"),
        ({"max_memory": {"cpu": "1GiB"}, "loading": "transformers"}, CombinationError, "device_map_auto"),
        ({"loading": "offload_disk"}, CombinationError, "allow_offload=True"),
        ({"loading": "tensor_parallel"}, NotRunnableError, "several processes"),
        ({"loading": "instanttensor"}, NotRunnableError, "CUDA"),
        ({"loading": "streamed", "allow_offload": True, "validation": "x"}, ConfigError, "validation=x"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_means_nothing_is_refused_in_words(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    """A wrong word ends in one sentence with the right one, not in a model that is not what was meant."""
    with pytest.raises(error, match=words):
        load(**arguments)


def test_code_of_a_checkpoint_is_not_run(tiny: Any, tmp_path: Path) -> None:
    """Who loads a stranger's folder gets its weights, and none of its code."""
    folder = copied(tiny, tmp_path / "theirs")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for method in ("auto", "transformers"):
        assert load(model=folder, loading=method).verification.passed
    assert not (tmp_path / "ran").exists()


def copied(tiny: Any, folder: Path) -> Path:
    folder.mkdir()
    for path in tiny.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_what_cannot_fit_is_refused_before_it_is_read(tiny: Any, tmp_path: Path) -> None:
    """A model larger than the memory is an error at once, not a machine that swaps: here 4 TB that take no disk."""
    folder = four_terabytes(tiny, tmp_path / "large")
    for method in ("auto", "transformers", {"engine": "transformers", "device_map": "auto"}):
        with pytest.raises(NotRunnableError, match=r"needs 4096\.00 GiB of host memory.*nothing was read"):
            load(model=folder, loading=method)


@pytest.mark.parametrize("model", [3, None, "", b"tiny"])
def test_what_names_no_model_is_said_so(model: Any) -> None:
    """An empty variable of a start script is neither the current folder nor a TypeError."""
    with pytest.raises(ConfigError, match="names no model"):
        load(model=model)


def test_the_profile_chooses_for_its_model_and_device(tmp_path: Path) -> None:
    """What was measured best is what is loaded by: the verdict's file, the origin's JSON, or their content."""
    entry = {
        "device": "cpu",
        "dtype": "bfloat16",
        "cache": "warm",
        "method": "pread",
        "overrides": ["loading=safetensors_pread", "runtime.attn_implementation=eager"],
        "loading": {"name": "pread", "engine": "safetensors_pread", "dtype": "auto", "disable_cpu_offload": True},
        "evidence": {"best_of_all_dtypes": True},
    }
    content = {"schema_version": 1, "models": {"tiny": [{**entry, "device": "cuda:0"}, entry]}}
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(content))
    for profile in (path, str(path), content):
        loaded = load(profile=profile)
        assert (loaded.chosen_by, loaded.config.loading.engine) == ("profile", "safetensors_pread")
        assert loaded.effective["attention"] == "eager", "settings that were measured with it"
    assert load(profile=path, loading="streamed").chosen_by == "loading"
    origin = {"tiny": {"loading": {"device_map": "cpu", "torch_dtype": "float16", "disable_cpu_offload": True}}}
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    loaded = load(profile=tmp_path / "origin.json")
    assert (loaded.config.loading.engine, loaded.effective["dtype"]) == ("transformers", "float16")
    only_gpu = {"schema_version": 1, "models": {"tiny": [{**entry, "device": "cuda:0"}]}}
    own = {"schema_version": 1, "models": {"tiny": [{**entry, "checkpoint": loaded.checkpoint.fingerprint}]}}
    assert load(profile=own).chosen_by == "profile"
    other = {"schema_version": 1, "models": {"tiny": [{**entry, "checkpoint": "0" * 32}]}}
    for profile, words in (
        (other, "was measured for another checkpoint"),
        (only_gpu, "measured on cuda:0, and the load is on cpu"),
        ({"schema_version": 9, "models": {}}, "schema_version is 9"),
        ({"schema_version": 1, "models": {"tinny": [entry]}}, "Did you mean 'tinny'"),
        ({"tiny": {"loading": {"divice_map": "cpu"}}}, "Did you mean 'device_map'"),
        ({"tiny": {"loading": {"device_map": "cuda"}}}, "says device_map=cuda, and the load is on cpu"),
        ({"something": "else"}, "is no loading profile"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(profile=profile)


class Watched(ForgetsTheHead):
    """Remembers, without holding it, the model that it made wrong."""

    last: "weakref.ref[Any] | None" = None

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        Watched.last = weakref.ref(loaded.model)
        return loaded


class Breaks(Watched):
    """Fails with the model in its hands."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        raise LoadError(f"broke with {type(loaded.model).__name__}")


@pytest.mark.parametrize("engine,error", [(Watched, ValidationError), (Breaks, LoadError)])
def test_a_model_that_is_wrong_is_not_returned_and_not_kept(engine: type, error: type[LoadError]) -> None:
    """A service that catches the error and loads the next model has its memory back, though it holds the error."""
    method = TransformersLoading(name="wrong", engine=f"{__name__}:{engine.__name__}", device_map="device")
    with pytest.raises(error) as caught:
        load(loading=method)
    if isinstance(caught.value, ValidationError):
        assert [finding.kind for finding in caught.value.findings] == ["tie"]
        assert "is not what was asked for" in str(caught.value)
    gc.collect()
    assert Watched.last is not None and Watched.last() is None


@pytest.mark.slow
def test_content_is_proven_against_a_manifest_that_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One flipped bit is found; the manifest costs its reference load once, and that shows."""
    monkeypatch.setenv("LADEZEIT_CACHE", str(tmp_path))  # nobody made the manifest before
    told: list[str] = []
    first = load(validation="content", progress=lambda what, done, total: told.append(what))
    assert first.verification.passed and "bit for bit" in first.verification.reason
    assert any("reference load" in what for what in told)
    method = {"engine": f"engines_for_tests:{FlipsABit.__name__}", "device_map": "device"}
    with pytest.raises(ValidationError) as caught:
        load(validation="content", loading=method)
    assert [finding.name for finding in caught.value.findings] == ["model.norm.weight"]
    again = load(validation="content")
    seconds = [
        sum(phase.duration_s for phase in loaded.phases if phase.path == "prepare/references")
        for loaded in (first, again)
    ]
    assert seconds[1] < seconds[0]


def test_threads_may_load_at_once() -> None:
    """Requests that arrive together get a right model each, and transformers is left as it was."""
    before = (modeling_utils.PreTrainedModel._load_pretrained_model, modeling_utils.caching_allocator_warmup)
    methods = ["streamed", "transformers", {"engine": "transformers", "async_load": False}, "safetensors_mmap"] * 2
    done: list[Any] = []
    threads = [threading.Thread(target=lambda m=method: done.append(load(loading=m))) for method in methods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(methods) and all(loaded.verification.passed for loaded in done)
    assert before == (modeling_utils.PreTrainedModel._load_pretrained_model, modeling_utils.caching_allocator_warmup)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_what_is_offloaded_by_permission_lives_as_long_as_the_model(tiny: Any, tmp_path: Path) -> None:
    """Weights on the disk are there for every answer, and the folder goes with the model."""
    method = {"engine": "transformers", "device_map": "auto", "offload_folder": str(tmp_path)}
    permitted: Callable[..., Any] = lambda: load(  # noqa: E731
        loading=method, max_memory={"cpu": str(tiny.weight_bytes // 2)}, allow_offload=True
    )
    loaded = permitted()
    assert "disk" in loaded.device_map.values() and loaded.effective["offloaded_bytes"]["disk"] > 0
    import torch

    loaded.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    assert list(tmp_path.iterdir())
    del loaded
    gc.collect()
    assert not list(tmp_path.iterdir())
