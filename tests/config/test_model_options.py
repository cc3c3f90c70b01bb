"""Every option of group ``model`` composes, says what it is for, and means what its name says."""

from pathlib import Path

import ladezeit.conf
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ladezeit.checkpoint import synthetic
from ladezeit.config import FolderModel, HubModel, ModelConfig, PackagedModel, SyntheticModel
from ladezeit.config.hydra_support import register_schemas

FOLDER = Path(ladezeit.conf.__path__[0]) / "model"
OPTIONS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
#: Bytes of the tensors, as on the hub for Qwen2.5.
WEIGHT_BYTES = {
    "qwen2.5-0.5b-shape": 988_065_536,
    "qwen2.5-1.5b-shape": 3_087_428_608,
    "qwen2.5-7b-shape": 15_231_233_024,
}


def composed(option: str, *overrides: str) -> ModelConfig:
    register_schemas()
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        found = compose(overrides=[f"+model={option}", *overrides]).model
    model = OmegaConf.to_object(found)
    assert isinstance(model, ModelConfig)
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_composes_and_says_its_command(option: str) -> None:
    """The file's name, the name in results, and the command in its second line agree."""
    lines = (FOLDER / f"{option}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and lines[0].endswith(".")
    assert lines[1].startswith(f"# ladezeit model={option}")
    overrides = [f"model.{word.removeprefix('model.')}" for word in lines[1].split()[3:]]
    assert composed(option, *overrides).name == option


@pytest.mark.parametrize(("option", "expected"), WEIGHT_BYTES.items())
def test_shapes_have_the_size_of_the_real_models(option: str, expected: int) -> None:
    """``-shape`` promises the real model's number of bytes."""
    model = composed(option)
    assert isinstance(model, SyntheticModel)
    assert synthetic.synthetic_sizes(model).weight_bytes == expected


def test_the_other_options_are_what_their_comments_say() -> None:
    """Small models are small, the mixture has its 18,867 tensors, the hub model is pinned to a commit."""
    tiny, mixture = composed("tiny"), composed("qwen3-moe-shape")
    assert isinstance(tiny, SyntheticModel) and isinstance(mixture, SyntheticModel)
    assert synthetic.synthetic_sizes(tiny).file_bytes < 5_000_000
    assert len(synthetic.tensor_layout(mixture.architecture)) == 18_867
    assert 1e9 < synthetic.synthetic_sizes(mixture).file_bytes < 2e9
    hub = composed("qwen2.5-7b-instruct")
    assert isinstance(hub, HubModel) and len(hub.revision) == 40
    assert isinstance(composed("smollm2-135m"), PackagedModel)
    assert isinstance(composed("folder", "model.path=/data/x"), FolderModel)
