"""Every option file composes, says what it is for, and means something: a user may pick any of them."""

import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hypothesis import given
from hypothesis import strategies as st

from ladezeit.analysis.comparison import CONDITIONS
from ladezeit.analysis.statistics import samples_needed
from ladezeit.config import RunConfig, build_config, from_plain, to_plain
from ladezeit.config.hydra_support import register_schemas
from ladezeit.config.rules import check_combination
from ladezeit.config.schema import GROUPS
from ladezeit.config.serialize import point_id
from ladezeit.errors import CombinationError, ConfigError
from ladezeit.sweep.plan import Job, in_blocks, varying_keys

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
OPTIONS = sorted(CONF.glob("*/*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def hydra_at_conf() -> Iterator[None]:
    from hydra.core.plugins import Plugins

    register_schemas()
    Plugins.instance()
    from hydra_plugins.ladezeit_sweeper.sweeper import LadezeitSweeper

    Plugins.instance().register(LadezeitSweeper)
    with initialize_config_module("ladezeit.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> RunConfig:
    whole = compose("config", overrides=["outputs=/tmp/outputs", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(whole)
    return build_config(compose("config", overrides=["outputs=/tmp/outputs", *overrides]))


def fill(option: Path) -> list[str]:
    needed = {"folder": ["model.path=/data/model"], "traced": ["loading.function=my_module:load"]}
    return needed.get(option.stem, [])


@pytest.mark.parametrize("option", OPTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_an_option_composes_and_its_values_go_together(option: Path) -> None:
    built = composed(f"{option.parent.name}={option.stem}", *fill(option))
    check_combination(built)
    group = getattr(built, option.parent.name, None)
    if group is not None and hasattr(group, "name"):
        typed = "model" if option.stem == "folder" else option.stem  # a folder is called by its own name
        assert group.name == typed, "the name in results is the name that was typed"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_an_option_opens_with_its_purpose_and_its_command(option: Path) -> None:
    lines = [line for line in option.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ") and len(lines[0]) > 20, "purpose"
    assert lines[1].startswith("# ") and "ladezeit " in lines[1], "command"
    assert f"{option.parent.name}={option.stem}" in lines[1]
    assert option.parent.name in GROUPS


@pytest.mark.parametrize("option", OPTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_a_config_survives_the_way_to_the_worker(option: Path) -> None:
    """What the worker measures is what was composed, types included."""
    built = composed(f"{option.parent.name}={option.stem}", *fill(option))
    assert from_plain(to_plain(built)) == built


def test_an_experiment_may_change_any_key() -> None:
    """The origin case names itself, and the model it takes where memory does not suffice for its own."""
    built = composed("experiment=origin_case")
    assert (built.title, built.smaller_model) == ("origin_case", "qwen2.5-1.5b-shape")
    assert composed("experiment=demo", "title=mine").title == "mine"


@pytest.mark.parametrize("experiment", sorted(path.stem for path in CONF.glob("experiment/*.yaml")))
def test_an_experiment_takes_enough_samples_to_find_a_winner(experiment: str) -> None:
    """Complete separation of its methods would be significant: nobody waits for a sweep that cannot decide anything."""
    params = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())["hydra"]["sweeper"]["params"]
    samples = int(params.pop("sample").removeprefix("range(").removesuffix(")"))
    methods = math.prod(len(values.split(",")) for key, values in params.items() if key not in CONDITIONS)
    assert samples >= samples_needed(methods)


def test_the_point_is_what_is_measured_not_how_often_or_where_to() -> None:
    """Samples of one point are compared with each other; anything that changes the measurement is another point."""
    one = point_id(composed())
    assert one == point_id(composed("sample=7", "tracking=none", "title=x", "order_seed=3"))
    for other in ("loading=cuda_fp16", "cache=cold", "loading.dtype=float32", "phases=off", "inference=none"):
        assert one != point_id(composed(other)), other


@given(points=st.integers(1, 6), samples=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_block_holds_every_point_once(points: int, samples: int, seed: int) -> None:
    import copy

    base = RunConfig()
    jobs = []
    for point in range(points):
        for sample in range(samples):
            own = copy.copy(base)
            own.sample = sample
            jobs.append(Job([f"p={point}", f"sample={sample}"], own))
    ordered = in_blocks(jobs, seed)
    assert ordered == in_blocks(jobs, seed), "the seed decides the order"
    assert len(ordered) == len(jobs)
    assert [job.config.sample for job in ordered] == sorted(job.config.sample for job in jobs)
    for sample in range(samples):
        block = ordered[sample * points : (sample + 1) * points]
        assert {job.overrides[0] for job in block} == {f"p={point}" for point in range(points)}


def test_what_differs_is_found_from_the_overrides() -> None:
    built = composed()
    jobs = [
        Job([f"loading={m}", f"cache={c}", "device=cpu", f"sample={n}"], built)
        for m in "ab"
        for c in "cw"
        for n in "01"
    ]
    assert varying_keys(jobs) == ["cache", "loading", "sample"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["+loading.max_memory.device=1GiB"],
        ["loading.move_to_device=true"],
        ["loading=device_map_auto", "loading.offload_folder=/tmp/x"],
        ["device=cuda", "loading=cuda_fp16", "loading.device_map=cpu"],
        ["device=cuda", "loading=device_map_auto", "+loading.max_memory.cpu=10GiB"],
        ["loading.device_map={lm_head:disk}"],
        ["device=cuda", "loading=device_map_split", "loading.device_map={lm_head: cpu}"],
        ["device=cuda", "loading=device_map_split", "+loading.max_memory={device: 1GiB}"],
        ["device=cpu", "loading=device_map_split"],
        ["device=cpu", "loading=offload_cpu"],
        ["device=cpu", "loading=device_map_balanced", "+loading.max_memory.1=1GiB"],
    ],
)
def test_the_origins_rules_are_errors_by_name(overrides: list[str]) -> None:
    """`max_memory` without a strategy, and offload while it is disabled, were silent in the origin case."""
    with pytest.raises(CombinationError, match=r"loading\.|the placement of"):
        check_combination(composed(*overrides))


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_budget_goes_with_every_strategy(strategy: str) -> None:
    """`max_memory` means something wherever the placement is chosen for you, and nowhere else."""
    check_combination(composed(f"loading.device_map={strategy}", "+loading.max_memory={device: 1GiB}"))


def test_the_legacy_manager_enforces_none_of_them() -> None:
    check_combination(composed("loading=legacy_manager", "device=cuda"))


@pytest.mark.parametrize("override", ["+speed=1", "+loading.quick=1", "+model.architecture_=1"])
def test_an_added_key_that_nothing_reads_is_refused(override: str) -> None:
    """`+key=value` passes Hydra; measured with it, a user would believe that it did something."""
    with pytest.raises(ConfigError, match="is no key"):
        composed(override)


def test_a_password_in_a_config_is_refused_and_not_repeated() -> None:
    """Configs end up in results, logs and MLflow; the error itself must not show the secret either."""
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as refused:
        composed("tracking=server", "tracking.uri='http://me:geheim@host:5000'")
    assert "geheim" not in str(refused.value)


@pytest.mark.slow
def test_a_wheel_works_from_another_folder(tmp_path: Path) -> None:
    """`pip install` of a built wheel has the option files and the sweeper in it, and runs from anywhere."""
    source = tmp_path / "source"  # a copy: building leaves folders behind that a later build would pick up
    for part in ("src", "conf"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    build_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(build_wheel, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    names = {path.relative_to(site / "ladezeit" / "conf") for path in (site / "ladezeit" / "conf").rglob("*.yaml")}
    assert names == {path.relative_to(CONF) for path in CONF.rglob("*.yaml")}
    modules = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    assert {path.relative_to(site) for path in site.rglob("*.py")} == modules | {Path("ladezeit/conf/__init__.py")}
    program = (
        # without the editable install's finder, which would lend what the wheel lacks
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        f"sys.path.insert(0, {str(site)!r}); sys.argv = ['ladezeit', *sys.argv[1:]]\n"
        "from ladezeit.cli import run as app; assert app.__file__.startswith(sys.path[0]); app.main()"
    )
    arguments = [
        "-m",
        "tracking=none",
        "device=cpu",
        "inference=none",
        "sample=0,1",
        "process=inline",
        "discard_first=false",
    ]
    shown = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert len(list((tmp_path / "outputs" / "sweeps").glob("*/[01]/result.json"))) == 2
