"""`ladezeit-results verdict`: which method to use, what the current one costs, where the time goes."""

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.cli.results_commands.sources import Current, Experiment, Paths, TrackingUri, Where, read_source

if TYPE_CHECKING:
    from ladezeit.analysis.decision import Decision
    from ladezeit.results.reader import Samples


class Format(Enum):
    """How the verdict is written."""

    text = "text"
    md = "md"
    json = "json"


def verdict_command(
    paths: Paths = None,
    *,
    experiment: Experiment = None,
    tracking_uri: TrackingUri = None,
    where: Where = None,
    current: Current = None,
    format: Annotated[Format, typer.Option(help="How it is written.")] = Format.text,
    write_profile: Annotated[
        Path | None,
        typer.Option(
            help="Write the best methods as a loading profile: YAML, or JSON keyed by model if the name ends in .json."
        ),
    ] = None,
) -> None:
    """Decide: the best method per model and cache state, what the current one costs, where the time goes."""
    from ladezeit.analysis.decision import decide_methods
    from ladezeit.cli.results_commands.printing import make_console
    from ladezeit.report.document import what_was_read
    from ladezeit.report.verdict import as_document, as_markdown
    from ladezeit.results.fields import parse_conditions

    samples = read_source(paths, experiment, tracking_uri, where)
    decisions, notes = decide_methods(
        samples.results, samples.varying, current=parse_conditions(current) if current else None
    )
    if format is Format.json:
        read = {"unreadable": samples.unreadable, "left_out": samples.left_out, "samples_missing": samples.missing}
        document = as_document(decisions, notes, read=what_was_read(samples), **read)
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        words = as_markdown(decisions, notes, what_was_read(samples))
        if format is Format.md:
            print(words, end="")
        else:
            from rich.markdown import Markdown

            make_console().print(Markdown(words))
    if write_profile is not None:
        _write_profile(write_profile, samples, decisions)


def _write_profile(path: Path, samples: "Samples", decisions: "list[Decision]") -> None:
    from ladezeit.analysis import profile_writer

    written = profile_writer.write_profile(path, decisions)
    typer.echo(f"wrote {path}: {', '.join(written)}", err=True)
