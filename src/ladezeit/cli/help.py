"""The text of ``ladezeit --help``: the groups with their options, made from the option files' own first lines.

Hydra's own help page lists every group by composing a config for each, which takes a second; this one reads files.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from ladezeit.config.schema import GROUPS

EXAMPLES = """\
  ladezeit model=tiny                                            one load, seconds
  ladezeit -m 'loading=glob(*)' 'sample=range(7)'                every method, as many samples as that takes
  ladezeit -m loading=transformers,cuda_fp16 cache=cold,warm     two methods from both cache states
  ladezeit model=folder model.path=/data/my-model                your own checkpoint
  ladezeit experiment=demo                                       a small real model, six methods, cold and warm
  ladezeit experiment=demo loading=cuda_fp16 'sample=range(10)'  the same, narrowed
  ladezeit --config-dir my-conf loading=mine                     your own option files beside these"""

KEYS = """\
  device=auto|cuda|cuda:N|cpu   sample=N   phases=on|off   order_seed=N   discard_first=on|off
  ceilings=on|off   profile=on|off   outputs=FOLDER"""

FLAGS = """\
  -m, --multirun       sweep over everything given with commas, range() or glob(*)
  --cfg job            print the composed config and stop      --info defaults    how it was composed
  --config-dir DIR     add your own option files               -sc install=bash   tab completion (eval its output)
  --hydra-help         Hydra's own flags"""

TEMPLATE = """\
ladezeit finds, verifies and keeps the fastest correct way to get a Hugging Face language model onto your GPU.

Options, as group=option; any value as group.key=value:

{groups}

Keys:
{keys}

Examples:
{examples}

Flags:
{flags}

Exit codes: 0 all samples ok, 1 some not, 2 usage, 3 none ok, 130 interrupted.
"""


def is_help_requested(arguments: list[str]) -> bool:
    """Return whether the command line asks for this page."""
    return any(argument in ("--help", "-h") for argument in arguments)


def help_text(arguments: list[str]) -> str:
    """Return the help page; options in the folder that ``--config-dir`` names are among the others."""
    user_folder = _user_folder(arguments)
    lines = []
    for group, purpose in GROUPS.items():
        lines.append(f"  {group}: {purpose}")
        options = {**_options(files("ladezeit.conf") / group), **(_options(user_folder / group) if user_folder else {})}
        width = max(map(len, options), default=0)
        lines += [f"    {name:<{width}}  {first}" for name, first in sorted(options.items())]
    return TEMPLATE.format(groups="\n".join(lines), keys=KEYS, examples=EXAMPLES, flags=FLAGS)


def _options(folder: Traversable) -> dict[str, str]:
    """Return name and first comment line of each option file in `folder`; none where it is not there."""
    if not folder.is_dir():
        return {}
    return {
        entry.name.removesuffix(".yaml"): _purpose(entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


def _purpose(content: str) -> str:
    comments = (line.lstrip("# ").strip() for line in content.splitlines() if line.startswith("#"))
    return next((line for line in comments if line and not line.startswith("@package")), "")


def _user_folder(arguments: list[str]) -> Path | None:
    for position, argument in enumerate(arguments):
        if argument.startswith("--config-dir="):
            return Path(argument.partition("=")[2])
        if argument in ("--config-dir", "-cd") and position + 1 < len(arguments):
            return Path(arguments[position + 1])
    return None
