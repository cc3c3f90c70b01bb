"""The console script as a new user meets it: help, configs, wrong input, exit codes.

Real processes, but for the long list of wrong input: there the script's entry is called in this one.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import save_file

from ladezeit.cli import run as app

Run = Callable[..., subprocess.CompletedProcess[str]]
Entry = Callable[..., int]

QUICK = ("model=tiny", "tracking=none", "device=cpu", "inference.new_tokens=2")


def results(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "outputs").rglob("result.json"))]


def test_help_lists_every_option_with_its_purpose(ladezeit: Run) -> None:
    """A user sees at once what there is: each option file's first line is the help."""
    shown = ladezeit("--help")
    assert shown.returncode == 0
    conf = Path(__file__).parents[2] / "conf"
    for option in conf.glob("*/*.yaml"):
        assert f"    {option.stem} " in shown.stdout, option
    assert "experiment=demo" in shown.stdout and "Exit codes" in shown.stdout


def test_help_shows_the_users_own_options_too(ladezeit: Run, tmp_path: Path) -> None:
    own = tmp_path / "my-conf" / "loading"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# My own way.\n# ladezeit loading=mine\nname: mine\n")
    assert "    mine " in ladezeit("--help", "--config-dir", str(own.parent)).stdout
    assert "My own way." in ladezeit("--help", f"--config-dir={own.parent}").stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--cfg", "job"), "model:\n  name: tiny\n"),
        (("--cfg", "hydra"), "_target_: hydra_plugins.ladezeit_sweeper.sweeper.LadezeitSweeper\n"),
        (("--info", "defaults"), "| hydra/sweeper/ladezeit "),
        (("--info", "searchpath"), "| pkg://ladezeit.conf |"),
    ],
)
def test_hydras_own_questions_are_answered(ladezeit: Run, flags: tuple[str, ...], said: str) -> None:
    """The composed config, Hydra's own, the list of defaults and where options are searched can be looked at."""
    shown = ladezeit(*flags, *QUICK)
    assert shown.returncode == 0, shown.stderr
    assert said in shown.stdout


def test_tab_completion_offers_options(ladezeit: Run) -> None:
    """`ladezeit loading=<TAB>` lists the loading methods, once the completion is installed."""
    assert "complete" in ladezeit("-sc", "install=bash").stdout
    shown = ladezeit("-sc", "query=bash", COMP_LINE="ladezeit loading=", COMP_POINT="17")
    assert "loading=cuda_fp16" in shown.stdout and "loading=legacy_manager" in shown.stdout
    assert "schema" not in ladezeit("-sc", "query=bash", COMP_LINE="ladezeit loa", COMP_POINT="12").stdout


def the_rest(arguments: tuple[str, ...]) -> list[str]:
    """Return the overrides of a quick run for the keys that `arguments` do not name."""
    given = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    return [word for word in QUICK[:3] if word.partition("=")[0] not in given]


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Entry]:
    """The script's entry, called from a folder of its own; what it sets for its whole process is put back.

    Hydra's singletons are not put back as a whole (`hydra_restore_singletons`): the schema of our sweeper is
    registered when its module is imported, which happens once a process.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(app, "_refusal", None)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ladezeit", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return int(ended.value.code or 0)

    yield call
    GlobalHydra.instance().clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("loading=transfomers",), "Did you mean 'transformers'"),
        (("experiment=dmo",), "Did you mean 'demo'?"),
        (("lodaing=transformers",), "Did you mean 'loading'"),
        (("loading.dtyp=float16",), "Did you mean 'dtype'?"),
        (("loading.dtype=flaot16",), "Did you mean 'float16'"),
        (("+loading.quick=true",), "'loading.quick' is no key of the config"),
        (("+speed=fast",), "'speed' is no key of the config"),
        (("sample=abc",), "sample: Value 'abc'"),
        (("sample=-1",), "sample=-1 is too small"),
        (("process.time_limit_s=soon",), "process.time_limit_s: Value 'soon'"),
        (("device=cuba",), "Did you mean 'cuda'"),
        (("device=cuda:7",), "device=cuda:7 was asked for"),
        (("model=folder",), "model.path has no value"),
        (("model=folder", "model.path=/nowhere/at/all"), "/nowhere/at/all"),
        (("loading=legacy_manager", "loading.engine=vlm"), "is not an engine"),
        (("+loading.max_memory.device=1GiB",), "Use loading.device_map=auto"),
        (("loading=device_map_auto", "loading.offload_folder=/tmp"), "loading.disable_cpu_offload=false"),
        (("loading=cuda_fp16", "loading.device_map=atuo"), "Did you mean 'auto'?"),
        (("loading.device_map=cudax",), "Did you mean 'cuda'"),
        (("loading.device_map={model.layers: dsik}",), "Did you mean 'disk'?"),
        (("loading.device_map={model.layers: disk}",), "loading.disable_cpu_offload=false"),
        (("loading=single_device_map", "+loading.device_map={model.layers: cpu}"), "name every module instead"),
        (("loading=device_map_auto", "+loading.max_memory={gpu: 1GiB}"), "its keys are device, cpu or the number"),
        (("loading=device_map_auto", "+loading.max_memory={device: lots}"), "'lots' for device"),
        (("loading=device_map_auto", "+loading.max_memory={1: 1GiB}"), "+loading.max_memory.1=VALUE"),
        (("loading=device_map_split",), "names cuda:1"),
        (("loading=offload_cpu",), "one and the same on a CPU run"),
        (("runtime.allocator=expandable:yes",), "allocator"),
        (("sample=0,1",), "--multirun"),
        (("-m", "sample=x,y"), "sample: Value 'x'"),
        (("-m", "device=cuda", "sample=0,1"), "device=cuda was asked for"),
        (("=",), "Could not override ''"),
        (("tracking=server",), "MLFLOW_TRACKING_URI"),
        (("loading=null",), "GROUP=OPTION"),
        (("-m", "loading=null"), "GROUP=OPTION"),
        (("=5",), "GROUP=OPTION"),
        (("~sample",), "sample has no value"),
        (("sample=inf",), "sample: Value 'inf'"),
        (("-m", "sample=range(0)"), "one of its axes has no values"),
        (("-m", "sample=0,1", "hydra.sweep.subdir=same"), "hydra.sweep.subdir is 'same' for several samples"),
        (("-sc", "install=tcsh"), "No completion plugin for 'tcsh' found"),
    ],
)
def test_wrong_input_is_one_clear_message_and_nothing_else(
    entry: Entry, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """What was asked, what to do, exit code 2, no stack trace, and no folder left behind."""
    code = entry(*arguments, *the_rest(arguments))
    shown = capsys.readouterr()
    assert code == 2, shown.out + shown.err
    assert shown.err.startswith("ladezeit: ") and said in shown.err
    assert "Traceback" not in shown.err and "Error executing job" not in shown.err
    assert not list((tmp_path / "outputs").rglob("*.yaml"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("lodaing=transformers",), "Did you mean 'loading'"),  # found while the config is composed
        (("device=cuda:7",), "device=cuda:7 was asked for"),  # found by the task
        (("-m", "sample=x,y"), "sample: Value 'x'"),  # found by the sweeper
    ],
)
def test_the_script_refuses_as_its_entry_does(
    ladezeit: Run, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """The same through the script itself: Hydra's own way to print errors and to exit stays out of sight."""
    shown = ladezeit(*arguments, *the_rest(arguments))
    assert shown.returncode == 2, shown.stdout + shown.stderr
    assert shown.stderr.startswith("ladezeit: ") and said in shown.stderr
    assert "Traceback" not in shown.stderr and "Error executing job" not in shown.stderr
    assert not list((tmp_path / "outputs").rglob("*.yaml"))


def test_a_missing_folder_for_outputs_that_cannot_be_made(ladezeit: Run) -> None:
    """A read-only outputs folder is said before anything is measured."""
    shown = ladezeit(*QUICK, "outputs=/proc/outputs")
    assert shown.returncode == 2
    assert "/proc/outputs" in shown.stderr and "outputs=FOLDER" in shown.stderr and "Traceback" not in shown.stderr


def _checkpoint(folder: Path, tiny: object) -> Path:
    import shutil

    shutil.copytree(tiny.folder, folder)  # type: ignore[attr-defined]
    return folder


def _truncated(folder: Path) -> str:
    shard = folder / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    return "model.safetensors"


def _without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "weights"


def _without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def _index_outside(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "outside"


def _index_missing(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00001-of-00002.safetensors"


def _evil_pickle(folder: Path) -> str:
    import torch

    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.system, ("touch /tmp/ladezeit-was-here",))

    torch.save({"weight": torch.zeros(1), "evil": Evil()}, folder / "pytorch_model.bin")
    return "posix.system"


@pytest.mark.parametrize(
    "damage", [_truncated, _without_weights, _without_config, _index_outside, _index_missing, _evil_pickle]
)
def test_a_damaged_or_unsafe_checkpoint_is_refused_before_anything_starts(
    ladezeit: Run, tmp_path: Path, tiny: object, damage: Callable[[Path], str]
) -> None:
    folder = _checkpoint(tmp_path / "checkpoint", tiny)
    said = damage(folder)
    shown = ladezeit("model=folder", f"model.path={folder}", "tracking=none", "device=cpu")
    assert shown.returncode == 2, shown.stdout
    assert said in shown.stderr and "Traceback" not in shown.stderr
    assert not Path("/tmp/ladezeit-was-here").exists()
    assert results(tmp_path) == []


def test_a_safe_pickle_checkpoint_loads(ladezeit: Run, tmp_path: Path, tiny: object) -> None:
    """An old `.bin` checkpoint with nothing but tensors in it is no reason to refuse."""
    import torch
    from safetensors.torch import load_file

    folder = _checkpoint(tmp_path / "checkpoint", tiny)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    shown = ladezeit("model=folder", f"model.path={folder}", "tracking=none", "device=cpu")
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_missing_weights_are_wrong_not_random(ladezeit: Run, tmp_path: Path, tiny: object) -> None:
    """transformers fills a missing weight with random numbers and logs a table; here the sample is wrong."""
    from safetensors.torch import load_file

    folder = _checkpoint(tmp_path / "checkpoint", tiny)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shown = ladezeit("model=folder", f"model.path={folder}", "tracking=none", "device=cpu")
    assert shown.returncode == 3
    assert "wrong" in shown.stdout and "model.layers.1.mlp.up_proj.weight" in shown.stdout


def test_a_checkpoint_larger_than_memory_is_not_warmed(ladezeit: Run, tmp_path: Path, tiny: object) -> None:
    """Reading a file that does not fit would only throw out what was read first."""
    folder = _checkpoint(tmp_path / "checkpoint", tiny)
    shard = folder / "model.safetensors"
    length = int.from_bytes(shard.read_bytes()[:8], "little")
    header = json.loads(shard.read_bytes()[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    huge = 1 << 42
    header["model.huge.weight"] = {"dtype": "U8", "shape": [huge], "data_offsets": [end, end + huge]}
    text = json.dumps(header).encode()
    with shard.open("wb") as file:  # sparse: 4 TiB that take no room
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + end + huge)
        except OSError:
            pytest.skip("the file system has no sparse files of that size")
    shown = ladezeit("model=folder", f"model.path={folder}", "cache=warm", "tracking=none", "device=cpu")
    assert shown.returncode == 2
    assert "GiB" in shown.stderr and "cache=cold" in shown.stderr


def test_no_disk_space_for_a_synthetic_checkpoint(ladezeit: Run, tmp_path: Path) -> None:
    """A disk too small is said before the first byte, with the cure, and leaves nothing behind."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shown = ladezeit(*QUICK, LADEZEIT_CACHE=str(small))
        assert shown.returncode == 2
        assert "LADEZEIT_CACHE" in shown.stderr and "Traceback" not in shown.stderr
        assert not [path for path in small.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_one_load_prints_a_line_and_leaves_a_result(ladezeit: Run, tmp_path: Path) -> None:
    # What other tests have mapped of their own `tiny` could not be dropped from the page cache.
    shown = ladezeit(*QUICK, "loading=cuda_fp16", "cache=cold", LADEZEIT_CACHE=str(tmp_path / "cache"))
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^cold·cuda_fp16·#0 +ok  load ", shown.stdout, re.MULTILINE), shown.stdout
    (result,) = results(tmp_path)
    assert result["status"] == "ok" and result["effective"]["dtype"] == "float16"
    assert result["metrics"]["cold_start/first_token_s"] > result["metrics"]["load/total_s"]
    assert result["environment"]["libraries"]["torch"]


def test_the_fall_back_to_the_cpu_is_said_loudly(ladezeit: Run) -> None:
    """Without a GPU `device=auto` measures the CPU, and nobody can miss it."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "CPU" in ladezeit("model=tiny", "tracking=none", "inference=none").stdout.splitlines()[0]


def test_a_run_without_isolation_works_for_debuggers(ladezeit: Run, tmp_path: Path) -> None:
    shown = ladezeit(*QUICK, "process=inline")
    assert shown.returncode == 0, shown.stderr
    assert results(tmp_path)[0]["config"]["process"]["kind"] == "inline"


def test_a_defect_shows_its_trace(ladezeit: Run) -> None:
    """With HYDRA_FULL_ERROR=1 a developer sees where a refusal came from."""
    shown = ladezeit(*QUICK, "device=cuba", HYDRA_FULL_ERROR="1")
    assert shown.returncode != 0 and "Traceback" in shown.stderr


def test_the_module_runs_like_the_script(tmp_path: Path) -> None:
    """Where the script is not on PATH, `python -m ladezeit` is the same program."""
    shown = subprocess.run(
        [sys.executable, "-m", "ladezeit", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0 and "loading" in shown.stdout


def test_what_was_offloaded_is_told_and_removed(ladezeit: Run, tmp_path: Path) -> None:
    """A user's offload folder holds the same after a sample as before it; the result says how much went there."""
    folder = tmp_path / "fast"
    folder.mkdir()
    (folder / "mine").write_text("of the user")
    arguments = ("loading=offload_disk", "loading.dtype=float32", f"loading.offload_folder={folder}")
    shown = ladezeit(*arguments, "model=tiny", "tracking=none", "device=cpu")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert [entry.name for entry in folder.iterdir()] == ["mine"]
    (path,) = (tmp_path / "outputs").rglob("result.json")
    assert not (path.parent / "scratch").exists()
    result = json.loads(path.read_text())
    assert set(result["effective"]["offloaded_bytes"]) == {"disk"}
    assert result["metrics"]["memory/offloaded_gib"] == result["effective"]["offloaded_bytes"]["disk"] / 2**30
    assert "offloaded as allowed" in result["proof"]["reason"]
