"""Checkpoints as people have them: each is loaded as plain `from_pretrained` loads it, or refused with what to do."""

import json
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loads import differences, installed_engines, load_by, load_plainly
from safetensors.torch import load_file, save_file
from tiny_configs import tiny_model

from ladezeit.checkpoint.resolve import TEXT_PARTS, inspect_checkpoint
from ladezeit.errors import CombinationError, LadezeitError, NotRunnableError
from ladezeit.loading.base import EngineModel
from ladezeit.model.classes import class_and_config
from ladezeit.validation.expected import Expected
from ladezeit.validation.model_checks import find_other_class, not_taken_up, stored_generation_config

OUR_ROAD = [name for name in installed_engines() if name != "transformers"]


def saved(folder: Path, model_type: str = "qwen2") -> Path:
    tiny_model(model_type).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None takes one away."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# Code of the checkpoint.

OWN_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class MineConfig(Qwen2Config):
    model_type = "mine"


class MineForCausalLM(Qwen2ForCausalLM):
    config_class = {config}
"""


@pytest.mark.parametrize("known", [True, False], ids=["replaces a known class", "a type of its own"])
def test_trusted_code_makes_the_model_by_every_engine(known: bool, tmp_path: Path) -> None:
    """A checkpoint whose code is trusted is never loaded as the library's class in silence, nor refused."""
    folder = saved(tmp_path / ("replacing" if known else "own"))
    (folder / "modeling_mine.py").write_text(OWN_CODE.format(config="Qwen2Config" if known else "MineConfig"))
    names = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    own = {} if known else {"AutoConfig": "modeling_mine.MineConfig"}
    edit(folder, auto_map=names | own, model_type="qwen2" if known else "mine")
    plain, _ = load_plainly(folder, trust_remote_code=True)
    assert type(plain).__name__ == "MineForCausalLM"
    for engine in installed_engines():
        loaded = load_by(engine, folder, trust_remote_code=True).model
        assert differences(loaded, plain) == [], engine
    wanted = expected(model_class=class_and_config(folder, trust_remote_code=True)[0])
    assert find_other_class(plain, wanted) == []
    assert [one.kind for one in find_other_class(tiny_model("qwen2"), wanted)] == ["class"]
    if not known:
        with pytest.raises(LadezeitError, match="trust_remote_code"):
            load_by("streamed", folder)


def expected(**more: Any) -> Expected:
    return Expected("cpu", "bfloat16", single_device=True, offload_allowed=False, **more)


# An adapter beside the weights.


def test_an_adapter_is_added_or_the_engine_refuses(tmp_path: Path) -> None:
    """No model is served without the adapter that lies in its folder and that plain transformers adds."""
    peft = pytest.importorskip("peft")
    folder = saved(tmp_path / "adapted")
    base, _ = load_plainly(folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(folder)
    plain, _ = load_plainly(folder)
    assert any("lora" in name for name, _ in plain.named_parameters())
    for engine in ("transformers", "auto"):
        assert differences(load_by(engine, folder).model, plain) == [], engine
    for engine in (name for name in OUR_ROAD if name != "auto"):
        with pytest.raises(CombinationError, match="would leave out the adapter"):
            load_by(engine, folder)
    assert find_other_class(plain, expected(adapter=True)) == []
    assert [one.kind for one in find_other_class(tiny_model("qwen2"), expected(adapter=True))] == ["adapter"]


# The dtype, where the config does not say it in the usual place.


def _in_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {"dtype": "float16"}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(folder, dtype=None)


def _nowhere(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    first = min(tensors)
    mixed = {name: tensor.float() if name == first else tensor for name, tensor in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, dtype=None)


def _in_text(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, dtype=None, text_config={**text, "dtype": "float16"})


def _in_both(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, dtype="float32", text_config={**text, "dtype": "float16"})


@pytest.mark.parametrize(
    ("model_type", "arrange"),
    [
        ("qwen2", _in_index),
        ("qwen2", _nowhere),
        ("qwen3_5", _in_text),
        ("qwen3_5", _in_both),
        ("gemma3", _in_text),
        ("gemma3", _in_both),
    ],
)
def test_the_dtype_is_the_one_that_from_pretrained_finds(
    model_type: str, arrange: Callable[[Path], None], tmp_path: Path
) -> None:
    """A right load is not called wrong, and a wrong dtype not right, because the config says it elsewhere."""
    folder = saved(tmp_path / "model", model_type)
    arrange(folder)
    plain, _ = load_plainly(folder)
    assert f"torch.{inspect_checkpoint(folder, 'model').dtype}" == str(plain.dtype)
    for engine in installed_engines():
        assert differences(load_by(engine, folder).model, plain) == [], engine


def test_types_that_take_a_text_config_are_the_librarys() -> None:
    """The dtype of a checkpoint is looked for where the installed library looks for it; older ones have fewer types."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[name]
        text_class = config_class.sub_configs.get("text_config")
        if text_class is not None and MODEL_FOR_CAUSAL_LM_MAPPING[config_class].config_class is text_class:
            found.add(name)
    assert found == TEXT_PARTS & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


# What the library raises.


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, NotRunnableError),
        ({"attn_implementation": "flash_attention_2"}, NotRunnableError),
        ({"hidden_act": "unheard"}, LadezeitError),
        ({"hidden_size": "many"}, LadezeitError),
        ({"num_attention_heads": 0}, LadezeitError),
        ({"rope_parameters": {"rope_type": "unheard"}}, LadezeitError),
    ],
)
def test_what_the_library_refuses_is_one_line(
    changes: dict[str, Any], kind: type[LadezeitError], tmp_path: Path
) -> None:
    """Whatever engine is asked, a user reads what is missing or wrong, and no stack trace of a library."""
    folder = saved(tmp_path / "model")
    edit(folder, **changes)
    for engine in installed_engines():
        with pytest.raises(kind) as caught:
            load_by(engine, folder)
        assert "\n" not in str(caught.value), engine


def test_infinity_in_a_config_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    """Mamba 2 and others are published with `Infinity` in config.json, which is not JSON; they load all the same."""
    folder = saved(tmp_path / "model", "mamba2")
    edit(folder, time_step_limit=[0.0, float("inf")])
    assert "Infinity" in (folder / "config.json").read_text()
    plain, _ = load_plainly(folder)
    for engine in installed_engines():
        assert differences(load_by(engine, folder).model, plain) == [], engine


def test_nan_in_a_generation_config_is_itself(tmp_path: Path) -> None:
    """A model is not called wrong because NaN is not equal to NaN."""
    folder = saved(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": NaN, "do_sample": true}')
    assert not_taken_up(load_by("streamed", folder).model, stored_generation_config(folder)) == []


def test_a_generation_config_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    """A hostile checkpoint does not make a load wait for ever."""
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(LadezeitError, match="not a regular file"):
        stored_generation_config(tmp_path)


# Where and when a load is called.


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("cpu"), lambda: torch.autocast("cpu")],
    ids=["inference_mode", "no_grad", "device", "autocast"],
)
def test_a_context_of_torch_changes_no_more_than_it_changes_for_the_library(
    context: Callable[[], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    """Weights that were loaded inside of a context can be used outside as those of `from_pretrained` can."""
    folder = saved(tmp_path / "model", "qwen3_moe")
    with context():
        plain, _ = load_plainly(folder)
    for engine in OUR_ROAD:
        with context():
            loaded = load_by(engine, folder).model
        assert differences(loaded, plain) == [], engine
        kinds = [{name: one.is_inference() for name, one in model.named_parameters()} for model in (loaded, plain)]
        assert not [name for name, own in kinds[0].items() if own and not kinds[1][name]], engine


@pytest.mark.parametrize("engine", OUR_ROAD)
def test_a_load_on_meta_is_a_clear_error(engine: str, tmp_path: Path) -> None:
    """Called where everything is made on meta, a load says so in one line."""
    folder = saved(tmp_path / "model")
    with torch.device("meta"), pytest.raises(LadezeitError, match="meta"):
        load_by(engine, folder)


def test_a_child_of_a_fork_loads_while_its_parent_was_loading(tmp_path: Path) -> None:
    """A server that forks workers while a thread loads does not have them wait for ever."""
    folder = saved(tmp_path / "model")
    load_by("auto", folder)
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        from ladezeit.loading.transformers_patches import skip_redundant_init

        with skip_redundant_init():
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        from transformers import core_model_loading

        loaded: EngineModel | None = None
        try:
            import re

            if core_model_loading.re is re:
                loaded = load_by("safetensors_mmap", folder)
        finally:
            os._exit(0 if loaded is not None else 1)
    try:
        assert _ended(child, limit_s=60) == 0
    finally:
        go_on.set()
        thread.join()


def _ended(child: int, limit_s: float) -> int | None:
    import signal
    import time

    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
