"""Each rule of the origin case's cure, as a user of `ModelManager` meets it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ladezeit import ModelManager
from ladezeit.errors import ConfigError, LoadError

Config = Callable[..., dict[str, Any]]
ORIGIN = {
    "qwen-2.5-7b-instruct": {"loading": {"device_map": "cuda", "torch_dtype": "float16", "disable_cpu_offload": True}}
}


def test_the_origin_s_own_json_is_understood(tmp_path: Path) -> None:
    """A service that has the origin's file moves without changing it."""
    path = tmp_path / "performance.json"
    path.write_text(json.dumps(ORIGIN))
    manager = ModelManager(path)
    settings = manager.settings.models["qwen-2.5-7b-instruct"]
    assert manager.names == ["qwen-2.5-7b-instruct"]
    assert settings.device == "cuda"
    assert settings.arguments == {"dtype": "float16"}
    assert not settings.allow_offload
    assert settings.max_memory is None


def test_the_file_is_opened_once_whatever_is_done_after(tmp_path: Path, origin_config: Config) -> None:
    """The origin's manager read its settings twice a load: here they are read when the manager is made, never again."""
    path = tmp_path / "models.json"
    path.write_text(json.dumps(origin_config("ape", "bee")))
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]) == str(path):
            opened.append(event)

    sys.addaudithook(watch)  # cannot be taken away again, only switched off
    manager = ModelManager(path)
    manager.preload()
    manager.unload("ape")
    manager.get("ape")
    manager.status()
    watching = False
    assert len(opened) == 1


def test_max_memory_is_refused_where_the_placement_is_not_left_to_a_strategy(origin_config: Config) -> None:
    config = origin_config("ape")
    config["ape"]["loading"] |= {"max_memory": {"cpu": "1GiB"}}
    with pytest.raises(ConfigError, match=r"max_memory was given with device_map=cpu.*Use device_map=auto"):
        ModelManager(config)


def test_max_memory_reaches_transformers_with_device_map_auto(origin_config: Config) -> None:
    config = origin_config("ape")
    config["ape"]["loading"] |= {"device_map": "auto", "max_memory": {"cpu": "1GiB"}}
    config["ape"]["device"] = "cpu"
    loaded = ModelManager(config).get("ape")
    assert loaded.effective["arguments"]["max_memory"] == {"cpu": 2**30}


def test_nothing_is_offloaded_without_a_word(origin_config: Config) -> None:
    """A model that does not fit is an error that names modules, never a slow service."""
    config = origin_config("ape")
    config["ape"]["loading"] |= {"device_map": "auto", "max_memory": {"cpu": "1MiB"}}
    config["ape"]["device"] = "cpu"
    manager = ModelManager(config)
    with pytest.raises(LoadError, match="modules were offloaded"):
        manager.get("ape")
    assert manager.status().models["ape"].state == "failed"
    assert manager.status().charged.host == 0


def test_validation_is_chosen_per_model_and_its_cost_is_shown(origin_config: Config) -> None:
    """All modules, a sample, none, or the proof that is cheap enough for every load, which is the default."""
    config = {**origin_config("ape"), **origin_config("bee", validation="all_modules")}
    del config["ape"]["loading"]["disable_cpu_offload"]  # the default
    manager = ModelManager({**config, **origin_config("cat", validation="none")})
    assert ModelManager(config, validation="sampled").settings.models["ape"].validation == "sampled"
    assert ModelManager(config, validation="sampled").settings.models["bee"].validation == "all_modules"
    with pytest.raises(ConfigError, match="Did you mean 'sampled'"):
        ModelManager(config, validation="sampeld")
    manager.preload()
    status = manager.status().models
    assert status["ape"].validation == "placement"
    assert "every key matched" in (status["ape"].verification or "")
    assert "modules is on meta; nothing else was looked for" in (status["bee"].verification or "")
    assert all((status[name].validation_s or 0) > 0 for name in ("ape", "bee"))
    assert all(
        each.validation_s is not None and each.load_s and each.validation_s < each.load_s for each in status.values()
    )


def test_performance_settings_are_applied_once(origin_config: Config) -> None:
    """What the application changes after the first load stays as it set it."""
    import torch

    before = torch.get_num_threads()
    manager = ModelManager({"runtime": {"threads": 1}, **origin_config("ape", "bee")})
    try:
        assert torch.get_num_threads() == before, "nothing is set before the first load"
        manager.get("ape")
        assert torch.get_num_threads() == 1
        assert (manager.status().runtime or {})["threads"] == 1
        torch.set_num_threads(2)
        manager.get("bee")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_dtype_that_was_asked_for_is_the_dtype_that_is_there(origin_config: Config) -> None:
    config = origin_config("ape")
    config["ape"]["loading"]["torch_dtype"] = "float16"
    import torch

    assert {parameter.dtype for parameter in ModelManager(config).get("ape").model.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"a": {"loading": {"devicemap": "cuda"}}}, r"'devicemap'.*Did you mean 'device_map'"),
        ({"a": {"lodaing": {}}}, r"'lodaing'.*Did you mean 'loading'"),
        ({"a": {"validation": "placment"}}, r"'placment'.*Did you mean 'placement'"),
        ({"a": {"loading": {"torch_dtype": "flaot16"}}}, r"'flaot16'.*Did you mean 'float16'"),
        ({"runtime": {"thraeds": 2}, "a": {}}, r"'thraeds'.*Did you mean 'threads'"),
        ({"a": {"loading": {"disable_cpu_offload": "yes"}}}, "neither true nor false"),
        ({"a": {"loading": {"dtype": "float16", "torch_dtype": "float16"}}}, "both dtype and torch_dtype"),
        ({"a": {"model": "tiny", "path": "/x"}}, "both model and path"),
        ({"a": []}, "must hold keys and values"),
        ({}, "names no model"),
    ],
)
def test_what_a_configuration_does_not_mean_is_an_error(document: dict[str, Any], said: str) -> None:
    """A key that is misspelled is never a setting that silently does nothing."""
    with pytest.raises(ConfigError, match=said):
        ModelManager(document)


def test_a_name_that_is_no_model_names_the_nearest(origin_config: Config) -> None:
    with pytest.raises(ConfigError, match=r"there is no model 'baa'.*ape, bee, cat"):
        ModelManager(origin_config()).get("baa")


@pytest.mark.parametrize(("name", "text"), [("m.json", "{"), ("m.json", '{"a": {}, "a": {}}'), ("m.yaml", "[1]")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=name):
        ModelManager(path)


def test_making_a_manager_costs_no_framework(tmp_path: Path) -> None:
    """A service that answers its health check at once imports torch when it loads, and Hydra or MLflow never."""
    path = tmp_path / "models.json"
    path.write_text(json.dumps(ORIGIN))
    code = f"import sys, ladezeit; ladezeit.ModelManager({str(path)!r}).status(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "hydra", "mlflow"} & set(done.stdout.split())
