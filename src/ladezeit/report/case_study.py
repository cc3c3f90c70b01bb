"""The case study's figures beside what was measured here: its manager before the fix, and the same settings alone.

The figures are those of its own report, in its columns: load time, inference time, GPU memory, status. They are of
another machine, so only shares and ratios compare.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ladezeit.analysis.attribution import explain_difference, phase_medians
from ladezeit.analysis.comparison import PointFigures, Section
from ladezeit.analysis.eligibility import LOAD, format_value, machine_name
from ladezeit.analysis.profile_writer import SPECIMEN
from ladezeit.analysis.statistics import compare_against, estimate_ratio
from ladezeit.report.comparison_table import counts_text, escape_cell, p_said
from ladezeit.results.fields import metric_of, value_of
from ladezeit.results.format import format_seconds

#: The title of the sweeps that measure it, as ``conf/experiment/origin_case.yaml`` has it.
TITLE = "origin_case"

#: The option that loads with the manager's settings and nothing else.
CURE = "cuda_fp16"

_WALK = "load/module_walk"
_FIRST_TOKEN, _GPU_MEMORY = "inference/first_token_s", "memory/gpu_allocated_peak_gib"

#: Load times of the origin in seconds: its service before the cure, its settings alone, and about the former's walk.
BEFORE_S, ALONE_S, WALK_S = 180.89, 4.79, 170.0


@dataclass(frozen=True)
class Row:
    """One line of the origin's table; figures in seconds and GiB, None where they were not measured."""

    method: str
    load_s: float | None
    first_token_s: float | None
    gpu_memory_gib: float | None
    status: str


#: Qwen 2.5 7B Instruct in float16 on one NVIDIA GPU. It wrote GB: 7.616e9 weights of two bytes are 14.19 GiB.
REFERENCE_CASE = (
    Row("case study: the service, before the fix", BEFORE_S, 0.77, 14.21, "ok"),
    Row("case study: the same settings alone", ALONE_S, 0.11, 14.19, "ok"),
)


def compare_with_reference_case(section: Section) -> list[str]:
    """Return paragraphs of Markdown; none where the section has no manager before the cure with its cure."""
    points = [point for point in section.ranked if point.spread]
    managers = [point for point in points if _engine(point) == SPECIMEN]
    cure = next((point for point in points if value_of(point.samples[0], "loading") == CURE), None)
    if not managers or cure is None:
        return []
    others = [point for point in points if point not in managers]
    rows = [*REFERENCE_CASE, *map(_row, [*managers, *others])]
    said = [_origin_said(), *_managers_said(managers, cure), _machines(cure, section)]
    return ["### Comparison with the case study", _table(rows), "\n".join(f"- {escape_cell(line)}" for line in said)]


def _origin_said() -> str:
    return (
        f"The case study: the service took {BEFORE_S / ALONE_S:.1f} times as long as the same settings alone "
        f"({100 * (1 - ALONE_S / BEFORE_S):.1f} % saved). About {WALK_S:.0f} s were a walk over all modules after the "
        f"load. The settings were the same, so they were not the cause."
    )


def _managers_said(managers: Sequence[PointFigures], cure: PointFigures) -> list[str]:
    """Return how many times as long each manager takes as its settings alone, where that goes, and what its walk is."""
    chances = compare_against({point.point: point.metric_values(LOAD) for point in [*managers, cure]}, cure.point)
    lines = []
    for manager in managers:
        found = estimate_ratio(manager.metric_values(LOAD), cure.metric_values(LOAD))
        assert found is not None and manager.spread is not None  # load times are there and positive
        within = f"{found.interval.low:.3g}–{found.interval.high:.3g}"
        lines.append(
            f"Here: {manager.name} takes {found.estimate:.3g} times as long as {cure.name} ({within} in the "
            f"{100 * found.interval.coverage:.1f} % interval), {p_said(chances[manager.point])} (Holm-adjusted)."
        )
        if found.interval.low > 1:
            lines[-1] += " " + " ".join(explain_difference(manager, cure).sentences)
        walk_s, total_s = phase_medians(manager).get(_WALK), manager.spread.median
        if walk_s is not None:
            lines.append(
                f"The walk of {manager.name}: {format_seconds(walk_s)} s of {format_seconds(total_s)} s "
                f"({100 * walk_s / total_s:.1f} %); the case study's: about {WALK_S:.0f} s of {BEFORE_S} s "
                f"({100 * WALK_S / BEFORE_S:.0f} %)."
            )
    return lines


def _machines(cure: PointFigures, section: Section) -> str:
    sample = next((result for result in cure.samples if result.environment), cure.samples[0])
    model = section.conditions.get("model", "this model")
    return (
        f"The machines: here {machine_name(sample)}, {model}; the case study's report does not name its GPU, its model "
        f"was Qwen 2.5 7B Instruct. Compare ratios and shares, not seconds."
    )


def _row(point: PointFigures) -> Row:
    def median(metric: str) -> float | None:
        values = metric_of(point.samples, metric)
        return statistics.median(values) if values else None

    return Row(f"here: {point.name}", median(LOAD), median(_FIRST_TOKEN), median(_GPU_MEMORY), counts_text(point))


def _table(rows: Sequence[Row]) -> str:
    lines = ["| method | load s | first token s | GPU memory GiB | status |", "|:--|--:|--:|--:|:--|"]
    for row in rows:
        figures = [
            format_seconds(row.load_s),
            format_seconds(row.first_token_s),
            format_value(row.gpu_memory_gib, _GPU_MEMORY),
        ]
        lines.append(f"| {escape_cell(row.method)} | {' | '.join(figures)} | {row.status} |")
    return "\n".join(lines)


def _engine(point: PointFigures) -> object:
    return (point.samples[0].config.get("loading") or {}).get("engine")
