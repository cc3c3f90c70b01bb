"""Every command in the README and in docs/ works as it is written, on a model of some megabytes.

Commands stand in console blocks, behind a dollar sign. They are run in the order of their document, in one project
folder that all documents share, with what is large made small: `SMALL` says how. A command that cannot be run here
says so in itself, for the reader to see (``# needs the network``), and its reason begins as one of `REASONS`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ladezeit.results.records import SweepRecord

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")]),
]

#: Why a command is not run here.
REASONS = ("needs the network", "needs a GPU", "takes long")

#: Documents whose commands need what only a test of their own sets up.
TESTED_ELSEWHERE = {
    "regression-gate": "tests/docs/test_gate_docs.py",
    "reading-a-verdict": "tests/docs/test_verdict_docs.py",
}

#: The same for programs.
PROGRAMS_TESTED_ELSEWHERE = {"in-a-service": "tests/serving/test_service_docs.py"}

#: Programs that are not run, only compiled, and why.
PROGRAMS_NOT_RUN = {"README": "needs a model that speaks, and its measured loading profile"}

#: What is made small, so that commands written for a real model take seconds; the rest of each command stays.
SMALL = {
    r"^model=(?!folder|tiny).+": "model=tiny",
    r"^smollm2-135m$": "tiny",
    r"^model\.path=.+": "model.path={checkpoint}",
    r"^/data/from-the-gpu-box$": "outputs/sweeps/demo",
    r"^sample=range\(\d+\)$": "sample=0",
    r"^loading=glob\(\*\)$": "loading=glob(transformers*)",
    r"^cache=.+": "cache=as_is",  # a busy machine takes pages back, and the states have tests of their own
}
#: A command that stands in several documents is run once.
RAN: list[list[str]] = []
QUICK = ("device=cpu", "ceilings=off", "discard_first=off", "process=prewarmed", "inference=none")


def commands(document: Path) -> list[str]:
    """Return the commands of a document, with their comments."""
    blocks = re.findall(
        r"^```(?:console|bash)\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def excepted(command: str) -> bool:
    """Return whether a command says that it cannot be run here; make's targets are run by whoever runs this."""
    reason = command.partition("# ")[2].strip()
    return reason.startswith(REASONS) or command.startswith("make ")


def words_of(command: str, checkpoint: Path) -> list[str]:
    """Return a command's words, with what is large made small."""
    words = shlex.split(command, comments=True)
    for index, word in enumerate(words):
        for pattern, small in SMALL.items():
            if re.search(pattern, word):
                words[index] = small.format(checkpoint=checkpoint)
                break
    program = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    if Path(words[program]).name == "ladezeit":
        given = {word.partition("=")[0] for word in words}
        at = len(words) - 1 if words[-1] == "-m" else len(words)
        words[at:at] = [word for word in QUICK if word.partition("=")[0] not in given]
    if Path(words[program]).name == "ladezeit-trace":
        words += ["--samples", "1", "--cache", "as_is", *QUICK, "tracking=none"]
    return words


@pytest.fixture(scope="module")
def project(tiny: Any, tmp_path_factory: pytest.TempPathFactory, with_store: Callable[[Path], Path]) -> Iterator[Path]:
    """A folder as a reader has it: the repository's files, an environment in .venv, and the sweep that docs read."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("examples", "benchmarks", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    with_store(folder / "outputs")
    sweep = "ladezeit -m model=tiny loading=transformers,legacy_manager cache=as_is sample=range(5)"
    ran = run(folder, [*shlex.split(sweep), "hydra.sweep.dir=outputs/sweeps/demo", *QUICK])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Pages read the newest sweep; theirs are cut down to one sample here, so that this one has to stay the newest.
    record = SweepRecord.read_record(folder / "outputs" / "sweeps" / "demo")
    replace(record, started_at="2099-01-01T00:00:00+00:00").save_record(folder / "outputs" / "sweeps" / "demo")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell in `folder` would, with the environment's programs at hand.

    Checkpoints are made below that folder: one that a test in this process has mapped cannot be evicted.
    """
    program = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    own = dict(word.split("=", 1) for word in words[:program])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        words[program:],
        cwd=folder,
        env={**os.environ, "LADEZEIT_CACHE": str(folder / "cache"), "PATH": path, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if commands(d) and d.stem not in TESTED_ELSEWHERE], ids=lambda path: path.stem
)
def test_the_commands_of_a_document_work(document: Path, project: Path, tiny: Any) -> None:
    """Whoever types what stands there gets what is promised: exit code 0, and no stack trace."""
    for command in commands(document):
        words = words_of(command, tiny.folder)
        same = [word.removeprefix(".venv/bin/") for word in words]
        if not excepted(command) and same not in RAN:
            RAN.append(same)
            ran = run(project, words)
            assert ran.returncode == 0, f"$ {command}\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"
            assert "Traceback" not in ran.stderr, command


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if blocks(d, "python") and d.stem not in {*PROGRAMS_TESTED_ELSEWHERE, *PROGRAMS_NOT_RUN}],
    ids=lambda path: path.stem,
)
def test_the_python_of_a_document_works(document: Path, project: Path) -> None:
    """A block is a file of the examples, word by word, or a program that runs."""
    files = {path.read_text(encoding="utf-8") for path in ROOT.glob("examples/*.py")}
    for block in blocks(document, "python"):
        if block not in files:
            ran = run(project, ["PYTHONPATH=examples", sys.executable, "-c", block])
            assert ran.returncode == 0, f"{block}\n{ran.stderr[-3000:]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    """Each link to a file of the repository finds it, and each anchor a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (document.parent / file).resolve() if file else document
        assert found.exists(), f"{document.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{document.name}: {target}"


def test_every_program_compiles() -> None:
    for document in DOCUMENTS:
        for block in blocks(document, "python"):
            compile(block, str(document), "exec")


def test_documents_that_are_tested_elsewhere_are() -> None:
    assert all((ROOT / test).is_file() for test in {**TESTED_ELSEWHERE, **PROGRAMS_TESTED_ELSEWHERE}.values())


def test_every_target_of_make_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for command in commands(document):
            if command.startswith("make "):
                assert f"\n{command.split()[1]}:" in makefile, command


def test_the_example_option_in_the_documents_is_the_one_in_the_examples() -> None:
    option = (ROOT / "examples" / "conf" / "loading" / "whole_files.yaml").read_text(encoding="utf-8")
    assert option in blocks(ROOT / "docs" / "writing-an-engine.md", "yaml")


def test_the_readme_names_every_document() -> None:
    """A reader finds every page from the first one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for document in DOCUMENTS[1:]:
        assert f"({document.relative_to(ROOT)})" in readme, document
