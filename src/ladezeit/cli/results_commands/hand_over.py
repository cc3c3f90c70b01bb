"""`ladezeit-results hand-over`: the methods of a loading profile as command lines of other servers."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    profile: Annotated[Path, typer.Argument(help="A loading profile in YAML (verdict --write-profile).")],
    *,
    model: Annotated[
        str | None, typer.Option(help="What the servers are given: a hub id or a folder. Default: the profile's name.")
    ] = None,
) -> None:
    """Say how vLLM and SGLang load like the measured method, or that they cannot."""
    from ladezeit.analysis import profile_writer
    from ladezeit.report.server_flags import as_text, hand_over

    for name, entries in profile_writer.read(profile).items():
        for entry in entries:
            print(as_text(hand_over({"model": name, **entry}, model)))
