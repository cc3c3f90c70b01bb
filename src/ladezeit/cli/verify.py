"""The console script `ladezeit-verify`: whether one checkpoint holds the model that another one holds.

Exit codes: 0 it does, 1 it does not, 2 usage: no such checkpoint, or it cannot be loaded here.
"""

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from ladezeit.errors import run_as

DIFFERS = 1
MOST_SHOWN = 20

app = typer.Typer(name="ladezeit-verify", pretty_exceptions_enable=False, add_completion=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def _verify(
    model: Annotated[str, typer.Argument(help="What is loaded: a folder, a configured name, or org/name@revision.")],
    *,
    against: Annotated[
        str | None, typer.Option(help="What it must hold; left out: what plain from_pretrained makes of MODEL itself.")
    ] = None,
    level: Annotated[str, typer.Option(help="placement, content, logits or full.")] = "content",
    loading: Annotated[str, typer.Option(help="The method that MODEL is loaded by.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32; auto is the checkpoints' own.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N.")] = "auto",
) -> None:
    """Load MODEL and hold every tensor of it against another checkpoint: names, dtypes, ties, and every bit."""
    from ladezeit.serving.load import load
    from ladezeit.serving.request import dtype_of, loading_of
    from ladezeit.serving.verify import verify

    with Console(stderr=True).status(f"loading {model}") as status:

        def show(what: str, done: int, total: int) -> None:
            status.update(f"{what} {done / total:.0%}" if total else what)

        method = replace(loading_of(loading), dtype=dtype_of(dtype))
        loaded = load(model, loading=method, device=device, validation="none", progress=show)
        found = verify(loaded, against or model, level=level, dtype=dtype, progress=show)
    print(f"{model} against {against or model}: {'passed' if found.passed else 'differs'}")
    for finding in found.findings[:MOST_SHOWN]:
        print(f"  {finding}")
    if len(found.findings) > MOST_SHOWN:
        print(f"  and {len(found.findings) - MOST_SHOWN} more")
    if not found.passed:
        raise typer.Exit(DIFFERS)
    print(f"  {found.reason}")
    if found.claim:
        print(f"  {found.claim}")


def main() -> None:
    """Entry of the console script."""
    run_as("ladezeit-verify", app)
