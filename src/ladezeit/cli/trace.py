"""The console script `ladezeit-trace`: a load function of your own, measured in fresh processes beside another method.

It writes the option file that makes the function a loading method, runs the sweep that compares it, and prints the
verdict. Exit codes are those of `ladezeit`.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ladezeit.errors import USAGE, ConfigError, run_as


def trace_command(
    loader: Annotated[str, typer.Argument(help="module:function, module:Class.method, or path/to/file.py:function.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Any other config values, as key=value.")] = None,
    *,
    checkpoint: Annotated[str, typer.Option(help="A checkpoint's folder, or the name of a configured model.")],
    name: Annotated[
        str | None, typer.Option(help="Its name in results. Default: derived from the function's name.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Fresh processes per configuration; a verdict needs 5.")] = 5,
    cache: Annotated[str, typer.Option(help="cold, warm, half, as_is, or several, separated by commas.")] = "warm",
    against: Annotated[str, typer.Option(help="Loading methods to compare with; empty for none.")] = "transformers",
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure one profiled sample instead, and show its functions.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="The folder for the results.")] = None,
) -> None:
    """Measure your own load function as it is, verify its model, and report where its time goes."""
    from ladezeit.tracing.api import checkpoint_words

    folder = (output or Path("outputs") / "traces" / time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()
    function, importable_from = resolve_loader(loader)
    own = re.sub(r"\W+", "_", name or function.partition(":")[2]).strip("_").lower()
    conf = write_option(folder / "conf", own, function)
    words = ["--config-dir", str(conf), *checkpoint_words(checkpoint), *(overrides or [])]
    if profile:
        words += [f"loading={own}", f"cache={cache}", "profile=true", f"hydra.run.dir={folder / 'profiled'}"]
        read = ["show", str(folder / "profiled")]
    else:
        methods = ",".join([own, *filter(None, [against])])
        words += [f"loading={methods}", f"cache={cache}", f"sample=range({samples})"]
        words += [f"hydra.sweep.dir={folder / 'sweep'}", "-m"]
        read = ["verdict", str(folder / "sweep"), "--current", f"loading={own}"]
    searched = os.pathsep.join(filter(None, [str(importable_from), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": searched}
    code = subprocess.run([sys.executable, "-m", "ladezeit", *words], env=environment, check=False).returncode
    if code < USAGE:
        subprocess.run([sys.executable, "-m", "ladezeit.cli.results", *read], check=False)
    raise typer.Exit(code)


def resolve_loader(loader: str) -> tuple[str, Path]:
    """Return ``module:function`` and the folder that its module is to be imported from.

    Raises:
        ConfigError: the text has no function, or names a file that is not there.
    """
    place, _, function = loader.rpartition(":")
    if not (place and function):
        raise ConfigError(f"'{loader}' names no function: give module:function, or path/to/file.py:function")
    if not place.endswith(".py"):
        return loader, Path.cwd()
    file = Path(place).resolve()
    if not file.is_file():
        raise ConfigError(f"there is no file {file}: give path/to/file.py:function, or module:function")
    names, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return f"{'.'.join(names)}:{function}", folder


def write_option(conf: Path, name: str, function: str) -> Path:
    """Write the option file that makes `function` the loading method `name`, and return the folder for --config-dir.

    Raises:
        ConfigError: there is an option of that name among ladezeit's own.
    """
    from importlib.resources import files

    if (files("ladezeit.conf") / "loading" / f"{name}.yaml").is_file():
        raise ConfigError(f"'{name}' is a loading method of ladezeit's own: give yours another one with --name")
    option = conf / "loading" / f"{name}.yaml"
    option.parent.mkdir(parents=True, exist_ok=True)
    option.write_text(
        f"# {function}, as it is.\n# ladezeit --config-dir {conf} loading={name}\n"
        f"defaults:\n  - /schema/loading/traced@_here_\n  - _self_\nname: {name}\nfunction: {json.dumps(function)}\n"
    )
    return conf


def main() -> None:
    """Entry of the console script."""
    run_as("ladezeit-trace", lambda: typer.run(trace_command))


if __name__ == "__main__":
    main()
