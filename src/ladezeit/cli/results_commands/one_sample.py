"""Which one of the samples that were read is meant: by its job number, its label, or because there is only one."""

from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.errors import LadezeitError

if TYPE_CHECKING:
    from ladezeit.results.reader import Samples
    from ladezeit.results.records import Result

_MOST_NAMED = 20

Job = Annotated[int | None, typer.Option(help="The number of the sample's job: its folder in the sweep.")]
Label = Annotated[str | None, typer.Option(help="The sample's label, as in cold·streamed·#2.")]


def choose_sample(samples: "Samples", job: int | None, label: str | None) -> tuple["Result", str]:
    """Return the sample and its place.

    Raises:
        LadezeitError: none or several fit; the text lists what there is.
    """
    pairs = list(zip(samples.results, samples.places, strict=True))
    fitting = [
        (result, place)
        for result, place in pairs
        if (job is None or result.identity.job == job) and (label is None or result.identity.label == label)
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = fitting or pairs
    lines = [
        f"  --job {r.identity.job}  {r.identity.label}  {r.status.value}  {place}" for r, place in listed[:_MOST_NAMED]
    ]
    lines += [f"  … and {len(listed) - _MOST_NAMED} more"] if len(listed) > _MOST_NAMED else []
    found = "no sample fits" if not fitting else f"{len(fitting)} samples fit"
    raise LadezeitError("\n".join([f"{found}: choose one by --job, --label, --where or its folder", *lines]))
