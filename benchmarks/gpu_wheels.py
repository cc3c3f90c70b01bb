"""Gets the packages that a call of `gpu.py` brings to a machine without a network, and installs them there.

    python benchmarks/gpu_wheels.py --call 1 [--into .whl] [--python 3.12]

runs plain ``pip download`` and ``pip wheel`` commands, which are printed, for the Python of the GPU machine; which
packages, and how each is had, stands in `gpu_calls.PACKAGES`. Wheels that are in the folder already are removed first:
two versions of one package would stop the installation. The output ends with the size of each wheel, of the tree, and
of both; exit code 1 where they are more than a call may bring along.
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from gpu_calls import ANY, CALLS, LEFT_OUT, MIB, PACKAGES, ROOT, SOURCE

#: What a call may bring along is 64 MiB; the rest is left for changes that are in no commit.
MOST_BYTES = 58 * MIB
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def main() -> None:
    """Fill the folder and tell sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--call", type=int, choices=list(CALLS), required=True)
    parser.add_argument("--into", type=Path, default=ROOT / ".whl")
    parser.add_argument("--python", default="3.12", help="version of Python that they are for")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    for old in arguments.into.glob("*.whl"):
        old.unlink()
    for package in CALLS[arguments.call].packages:
        run(command(package, arguments.into, arguments.python))
    for name, pattern in LEFT_OUT.items():
        for wheel in arguments.into.glob(f"{name}-*.whl"):
            leave_out(wheel, re.compile(pattern))
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(arguments.into.glob("*.whl"))}
    sizes["the tree (git archive)"] = len(run(["git", "-C", str(ROOT), "archive", "HEAD"]))
    for name, size in sizes.items():
        print(f"{size / MIB:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / MIB:8.2f} MiB  in all, of {MOST_BYTES / MIB:.0f}")
    sys.exit(0 if total <= MOST_BYTES else f"call {arguments.call} brings too much along")


def command(package: str, folder: Path, python: str) -> list[str]:
    """Return the command that gets a package's wheel into `folder`."""
    how = PACKAGES[package]
    # A version of its own goes before the constraint that all others follow.
    pinned = [] if "==" in package else ["-c", str(ROOT / "constraints.txt")]
    common = ["--quiet", "--no-deps", *pinned]
    if how == SOURCE:
        return [*_PIP, "wheel", *common, "--wheel-dir", str(folder), package]
    platform = ["--platform", how] if how != ANY else []
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platform]
    return [*_PIP, "download", *common, *target, "--dest", str(folder), package]


def run(words: list[str]) -> bytes:
    """Run a command and return its output; ends with its exit code where it fails."""
    print("$", shlex.join(words), flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(words)} failed with exit code {done.returncode}")
    return done.stdout


def leave_out(wheel: Path, pattern: re.Pattern[str]) -> None:
    """Take the files whose names match `pattern` out of a wheel, which is a whole wheel afterwards."""
    beside = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as new:
        kept = [one for one in old.infolist() if not pattern.fullmatch(Path(one.filename).name)]
        lines = io.StringIO()
        record = csv.writer(lines, lineterminator="\n")
        for one in kept:
            if one.filename.endswith(".dist-info/RECORD"):
                place = one.filename
                continue
            content = old.read(one)
            new.writestr(one, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.writerow([one.filename, f"sha256={digest}", len(content)])
        record.writerow([place, "", ""])
        new.writestr(place, lines.getvalue())
    beside.replace(wheel)


def install(wheels: Path, target: Path) -> Path:
    """Install all wheels of a folder into `target`, without a network; ends with pip's words where that fails."""
    found = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    if not found:
        sys.exit(f"{wheels} holds no wheel: python benchmarks/gpu_wheels.py --call N --into {wheels} gets them")
    run([*_PIP, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target), *found])
    return target


if __name__ == "__main__":
    main()
