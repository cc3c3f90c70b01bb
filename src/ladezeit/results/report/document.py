"""What a report says, before it is written: the verdict, the comparisons behind it, and where all of it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass

from ladezeit.results.comparison import Comparison, Section, compare_points
from ladezeit.results.decision import Decision, compare_objectives, decide_on
from ladezeit.results.objectives import OBJECTIVES
from ladezeit.results.provenance import what_was_read
from ladezeit.results.reading import Samples
from ladezeit.results.report.fault_catches import Catch, fault_catches
from ladezeit.results.report.plots.validation_cost import METRIC as VALIDATION_COST
from ladezeit.results.selection import Condition


@dataclass(frozen=True)
class Report:
    """Everything that Markdown, HTML and pictures are made from; nothing is computed after this.

    `compared` holds one comparison an objective, in the order of `OBJECTIVES`, all with the same sections, to which
    `decisions` run parallel. `validation_costs` compares the time that the validation took.
    """

    title: str
    head: str
    samples: Samples
    compared: list[Comparison]
    decisions: list[Decision]
    notes: list[str]
    validation_costs: Comparison
    catches: dict[str, Catch]

    @property
    def load(self) -> Comparison:
        """The comparison of load times."""
        return self.compared[0]

    def section(self, objective: str, index: int) -> Section:
        """Return the section with that index, compared by the objective of that name."""
        names = [own.name for own in OBJECTIVES]
        return self.compared[names.index(objective)].sections[index]


def build(samples: Samples, *, current: Sequence[Condition] | None = None) -> Report:
    """Return the report on `samples`; `current` are conditions that the config in use meets.

    Raises:
        LadezeitError: as `ladezeit.results.decision.decide`: nothing can be compared.
    """
    varying = samples.varying
    compared = compare_objectives(samples.results, varying)
    decisions, notes = decide_on(compared, samples.results, varying, current=current)
    titles = dict.fromkeys(record.title for record in samples.sweeps)
    return Report(
        title=" + ".join(titles) or "Load times",
        head=what_was_read(samples),
        samples=samples,
        compared=compared,
        decisions=decisions,
        notes=notes,
        validation_costs=compare_points(samples.results, varying, metric=VALIDATION_COST),
        catches=fault_catches(),
    )
