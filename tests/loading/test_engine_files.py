"""An engine is one file: what else there is of it (schema, checks, flags, documents) is taken from there."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from packaging.requirements import Requirement

from ladezeit.config import FolderModel, TransformersLoading, ValidationConfig, ValidationLevel
from ladezeit.config.engines import arguments_class, find_engines
from ladezeit.config.rules import check_load
from ladezeit.config.run import LoadConfig, RuntimeConfig
from ladezeit.errors import CombinationError, ConfigError
from ladezeit.loading import engines
from ladezeit.loading.engines.fastsafetensors import FastsafetensorsLoading
from ladezeit.loading.engines.runai import RunaiLoading
from ladezeit.loading.registry import engine_specs

ROOT = Path(__file__).parents[2]

NEW_ENGINE = '''
"""An engine of one file."""

from contextlib import contextmanager
from dataclasses import dataclass

from ladezeit.config import LoadingConfig
from ladezeit.config.engines import ServerFlags
from ladezeit.config.loading import at_least
from ladezeit.errors import CombinationError
from ladezeit.loading.base import EngineSpec, LoadedTensors, LoadRequest


@dataclass
class NewLoading(LoadingConfig):
    engine: str = "new"
    lanes: int = at_least(1, 4)

    def check_arguments(self) -> None:
        if self.lanes == 13:
            raise CombinationError("loading.lanes=13 brings bad luck")


class NewEngine:
    def prepare(self, request: LoadRequest[NewLoading]) -> None:
        """Nothing."""

    @contextmanager
    def open(self, request: LoadRequest[NewLoading], clock):
        yield LoadedTensors({}, effective={"lanes": request.loading.lanes})


ENGINES = (
    EngineSpec(
        name="new",
        arguments=NewLoading,
        make=NewEngine,
        devices=("cuda",),
        servers=lambda loading: ServerFlags(("--lanes", str(loading["lanes"])), None),
    ),
)
'''

#: What a release with one more file among the engines does with it, told by the process that has it.
WITH_NEW_ENGINE = """
import sys
from dataclasses import replace
from pathlib import Path
folder = sys.argv[1]
import ladezeit.loading.engines as engines
engines.__path__.append(folder)
from ladezeit.config import RuntimeConfig, ValidationConfig, ValidationLevel
from ladezeit.config.compose import check_load_values, read_option
from ladezeit.config.rules import check_load
from ladezeit.config.run import HubModel, LoadConfig
from ladezeit.errors import LadezeitError
from ladezeit.loading import registry
from ladezeit.report.server_flags import export_flags
loading = read_option("loading", "new", Path(folder))
level = ValidationConfig(ValidationLevel.none)
config = LoadConfig(HubModel(name="m", repo_id="a/b"), loading, level, RuntimeConfig(), "cpu")
check_load_values(config)
check_load(config)
print(type(loading).__name__, loading.lanes)
print(export_flags({"loading": {"engine": "new", "lanes": 7}}, "m")[0].command)
for wrong in (lambda: registry.check_engine("new", "cpu", "safetensors"),
              lambda: check_load(replace(config, loading=replace(loading, lanes=13))),
              lambda: check_load_values(replace(config, loading=replace(loading, lanes=0)))):
    try:
        wrong()
    except LadezeitError as refused:
        print(refused)
assert "torch" not in sys.modules
print(type(registry.make_engine("new")).__name__)
"""


def test_a_new_engine_is_its_file_and_its_option(tmp_path: Path) -> None:
    """Schema, limits, checks, devices and flags of other servers follow from the file: nothing else is edited."""
    (tmp_path / "new.py").write_text(NEW_ENGINE)
    (tmp_path / "loading").mkdir()
    option = "defaults:\n  - /schema/loading/new@_here_\n  - _self_\nname: new\nlanes: 6\n"
    (tmp_path / "loading" / "new.yaml").write_text(option)
    shown = subprocess.run(
        [sys.executable, "-c", WITH_NEW_ENGINE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "NewLoading 6",
        "vllm serve m --lanes 7",
        "loading.engine=new needs CUDA: the run is on cpu. Use a machine that has it, or another loading method",
        "loading.lanes=13 brings bad luck",
        "loading.lanes=0 is too small: the least is 1",
        "StateDictEngine",
    ]


def test_to_know_all_engines_imports_nothing_that_they_load_with() -> None:
    """Composing a config, a worker's start and a report about servers stay as quick as if there were no engines."""
    program = (
        "import sys\nfrom ladezeit.config.engines import find_engines\n"
        "from ladezeit.report.server_flags import export_flags\n"
        "print(len(find_engines()), export_flags({'loading': {'engine': 'gguf'}}, 'm')[0].command)\n"
        "print([name for name in ('numpy', 'torch', 'transformers', 'hydra', 'mlflow') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [f"{len(find_engines())} vllm serve m --load-format gguf", "[]"]


def test_no_two_engines_have_one_name() -> None:
    """The second would take the first one's place without a word."""
    files = [import_module(f"{engines.__name__}.{found.name}") for found in iter_modules(engines.__path__)]
    names = [spec.name for file in files for spec in file.ENGINES]
    assert sorted(names) == sorted(find_engines())


def test_the_schemas_are_those_of_their_engines() -> None:
    """`loading.<key>` means what the engine's own file says."""
    assert arguments_class("fastsafetensors_gds") is FastsafetensorsLoading
    assert arguments_class("runai_streamer") is RunaiLoading
    assert arguments_class("mine:Engine") is TransformersLoading
    with pytest.raises(
        ConfigError, match=r"here: loading\.engine=fastsafetensor is not an engine.*mean 'fastsafetensors'"
    ):
        arguments_class("fastsafetensor", "here: ")


def test_an_engine_that_is_given_another_one_s_arguments_is_refused() -> None:
    """`loading=transformers loading.engine=streamed` would otherwise end in a stack trace from inside of the load."""

    def config(engine: str) -> LoadConfig:
        loading = TransformersLoading(name="mine", engine=engine)
        level = ValidationConfig(ValidationLevel.none)
        return LoadConfig(FolderModel(name="m", path="/m"), loading, level, RuntimeConfig(), "cpu")

    with pytest.raises(CombinationError, match=r"streamed takes its own .*extent_bytes.*/schema/loading/streamed$"):
        check_load(config("streamed"))
    check_load(config("mine:Engine"))


def test_a_package_that_an_engine_needs_is_one_that_is_installed_with_it() -> None:
    """`pip install 'ladezeit[engines]'` is the cure that the refusal names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    offered = {
        Requirement(text).name for text in [*project["dependencies"], *project["optional-dependencies"]["engines"]]
    }
    for name, spec in engine_specs().items():
        assert {Requirement(release).name for release in spec.releases} <= offered, name


def test_the_table_of_engines_is_what_their_files_say() -> None:
    """docs/engines.md leaves none out, and tells who needs a GPU or another package."""
    text = (ROOT / "docs" / "engines.md").read_text()
    table = text.partition("| `loading=` |")[2].partition("\n\n")[0]
    rows = [row.strip("|").split("|") for row in table.splitlines()[2:]]
    for name, spec in engine_specs().items():
        needs = [row[2] for row in rows if f"`{name}`" in row[0]]
        if name == "traced":  # has a guide of its own
            continue
        assert needs, f"docs/engines.md has no row for {name}"
        core = spec.packages == ("gguf",)  # comes with ladezeit itself
        assert ("the extra" in needs[0]) == (bool(spec.packages) and not core), name
        assert spec.devices != ("cuda",) or "CUDA" in needs[0], name
