"""`ladezeit-results hand-over`: the methods of a loading profile as command lines of other servers."""

from pathlib import Path
from typing import Annotated

import typer


def hand_over_command(
    profile: Annotated[Path, typer.Argument(help="A loading profile in YAML (verdict --write-profile).")],
    *,
    model: Annotated[
        str | None,
        typer.Option(help="The model argument for the servers: a hub ID or a folder. Default: the profile's name."),
    ] = None,
) -> None:
    """Print the vLLM and SGLang flags that load like the measured method, or say that there are none."""
    from ladezeit.analysis import profile_writer
    from ladezeit.report.server_flags import as_text, export_flags

    for name, entries in profile_writer.read_profile(profile).items():
        for entry in entries:
            print(as_text(export_flags({"model": name, **entry}, model)))
