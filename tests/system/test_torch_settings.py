"""Performance settings: what is asked for takes effect, or the user hears why not."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ladezeit.config import MatmulPrecision, RuntimeConfig
from ladezeit.errors import ConfigError
from ladezeit.system import torch_settings


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    """Put this process's settings back: other tests run in it."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    tf32, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark


def in_a_new_process(config: str, device: str) -> subprocess.CompletedProcess[str]:
    """Start Python with the environment that `config` asks for, apply it there, and print what is effective."""
    program = (
        "import json, torch; from ladezeit.config import RuntimeConfig; "
        "from ladezeit.system.torch_settings import apply_settings; "
        f"print(json.dumps(apply_settings({config}, {device!r})))"
    )
    environment = os.environ | torch_settings.import_environment(eval(config))
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_nothing_asked_for_changes_nothing_and_says_what_there_is() -> None:
    """`runtime=default` leaves the library's defaults, and the result says which they were."""
    before = (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark)
    effective = torch_settings.apply_settings(RuntimeConfig(), "cpu")
    assert (effective["threads"], effective["matmul_precision"], effective["cudnn_benchmark"]) == before
    assert json.loads(json.dumps(effective)) == effective


def test_settings_are_in_effect_and_read_back() -> None:
    """The origin case's settings are in effect after they were applied, and the record comes from torch."""
    asked = RuntimeConfig(matmul_precision=MatmulPrecision.high, allow_tf32=True, cudnn_benchmark=True, threads=1)
    effective = torch_settings.apply_settings(asked, "cpu")
    assert effective["threads"] == torch.get_num_threads() == 1
    assert effective["matmul_precision"] == torch.get_float32_matmul_precision() == "high"
    assert effective["allow_tf32"] is torch.backends.cuda.matmul.allow_tf32 is True
    assert effective["cudnn_benchmark"] is torch.backends.cudnn.benchmark is True


def test_settings_that_contradict_each_other_are_refused() -> None:
    """Full float32 precision and TF32 cannot both be had; the one that would win silently is named."""
    asked = RuntimeConfig(matmul_precision=MatmulPrecision.highest, allow_tf32=True)
    with pytest.raises(ConfigError, match=r"matmul_precision=highest was asked for, torch has 'high'"):
        torch_settings.apply_settings(asked, "cpu")


def test_the_environment_holds_only_what_was_asked_for() -> None:
    """A sample's process is given no variable that nobody asked for, but for the GPUs' numbering."""
    assert torch_settings.import_environment(RuntimeConfig()) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert torch_settings.import_environment(RuntimeConfig(threads=3))["OMP_NUM_THREADS"] == "3"


def test_threads_are_set_before_torch_is_imported() -> None:
    """OpenMP reads its number of threads once, at its start: a fresh process gets it in time."""
    done = in_a_new_process("RuntimeConfig(threads=1)", "cpu")
    assert json.loads(done.stdout)["threads"] == 1, done.stderr


def test_the_installed_torch_reads_the_allocator_variable() -> None:
    """The name of the variable is the one that this torch reads (it changed between versions)."""
    asked = RuntimeConfig(allocator="expandable_segments:True,max_split_size_mb:512")
    ask = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if ask is None:
        pytest.skip("this torch tells its allocator's settings on a GPU only")
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch._C._accelerator_getAllocatorSettings())"],
        env=os.environ | torch_settings.import_environment(asked),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == asked.allocator
    assert "deprecated" not in done.stderr.lower()


@pytest.mark.parametrize(
    ("allocator", "message"),
    [
        ("expandable_segment:True", "Did you mean 'expandable_segments'"),
        ("expandable_segments", "is not a list of options from 'expandable_segments' on"),
        ("expandable_segments:True;max_split_size_mb:64", "is not a list of options"),
        ("max_split_size_mb:64,,", "is not a list of options from ',' on"),
    ],
)
def test_allocator_options_that_torch_would_ignore_are_refused(allocator: str, message: str) -> None:
    """torch lets a misspelt option pass without a word: the sweep would compare a setting with itself."""
    with pytest.raises(ConfigError, match=message):
        torch_settings.import_environment(RuntimeConfig(allocator=allocator))


@pytest.mark.parametrize(
    "allocator",
    [
        "expandable_segments:True",
        "max_split_size_mb:64, garbage_collection_threshold:0.8",
        "roundup_power2_divisions:[256:1,512:2,>:4],backend:native",
    ],
)
def test_allocator_options_of_the_manual_are_taken(allocator: str) -> None:
    """What torch's manual shows can be written as it stands there."""
    assert allocator in torch_settings.import_environment(RuntimeConfig(allocator=allocator)).values()


def test_the_allocator_has_no_part_in_a_run_on_the_cpu() -> None:
    """The origin case's settings can be run without a GPU; the result does not claim that they did anything."""
    assert (
        torch_settings.apply_settings(RuntimeConfig(allocator="expandable_segments:True"), "cpu")["allocator"] is None
    )


def test_an_allocator_setting_that_came_too_late_is_refused() -> None:
    """torch was imported before the setting was there: it has no effect, and that is said."""
    if getattr(torch._C, "_accelerator_getAllocatorSettings", None) is None:
        pytest.skip("this torch tells its allocator's settings on a GPU only")
    with pytest.raises(ConfigError, match="process must start with it"):
        torch_settings.apply_settings(RuntimeConfig(allocator="expandable_segments:True"), "cuda:0")


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_the_attention_of_the_model_is_told(asked: str) -> None:
    """The result says which attention runs, not which was asked for."""
    config = Qwen2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=asked)
    assert torch_settings.effective_attention(model) == asked


def test_parts_with_different_attention_are_told_apart() -> None:
    """A model of text and vision may run two kinds."""

    class Part:
        def __init__(self, name: str) -> None:
            self._attn_implementation = name

    class Config(Part):
        sub_configs = ("text_config", "vision_config")
        text_config = Part("sdpa")
        vision_config = Part("eager")

    class Model:
        config = Config("sdpa")

    assert torch_settings.effective_attention(Model()) == "sdpa, text_config=sdpa, vision_config=eager"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpus_allocator_is_what_was_asked_for() -> None:
    """The origin case's allocator setting reaches a fresh process on a GPU, and torch confirms it."""
    config = "RuntimeConfig(allocator='expandable_segments:True')"
    done = in_a_new_process(config, "cuda:0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["allocator"] == "expandable_segments:True"
