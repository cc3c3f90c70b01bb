"""What a person sees while samples run: one line a finished sample, and a live bar where there is a terminal."""

import traceback
from types import TracebackType

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ladezeit.results.format import LOG_WIDTH
from ladezeit.results.records import Result, Status

_COLORS = {Status.ok: "green", Status.skipped: "yellow", Status.invalid: "yellow"}

#: How often the live line is drawn: rarely, because drawing takes from the processor that is being measured.
_DRAWS_PER_SECOND = 2


class Display:
    """Prints to the terminal; use as a context manager, so that the live bar is gone before anything else prints."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, LOG_WIDTH)
        self._progress = Progress(
            TextColumn("{task.fields[label]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
            console=self.console,
            refresh_per_second=_DRAWS_PER_SECOND,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin_bar(self, total: int) -> None:
        """Open the bar for `total` samples."""
        self._total = total
        self._task = self._progress.add_task("", total=total, label="", phase="")
        self._progress.start()

    def finish_bar(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def show_sample(self, label: str) -> None:
        """Name the sample that runs now."""
        if self._task is not None:
            self._progress.update(self._task, label=label, phase="")

    def show_phase(self, path: str) -> None:
        """Name what is going on inside the sample."""
        if self._task is not None:
            self._progress.update(self._task, phase=path)

    def show_result(self, result: Result, counted: bool = True) -> None:
        """Print a finished sample's line; `counted` is False for the one that is measured but never compared."""
        if counted:
            self._done += 1
            if self._task is not None:
                self._progress.update(self._task, completed=self._done)
        number = f"[{self._done:>{len(str(self._total))}}/{self._total}]" if counted and self._total else "[warm-up]"
        number = "" if not self._total else escape(number) + " "
        color = _COLORS.get(result.status, "red")
        line = f"{number}{escape(result.identity.label):<20}  [{color}]{result.status.value}[/]{_figures(result)}"
        self.console.print(line, soft_wrap=True)
        if result.status is not Status.ok and result.reason:
            self.console.print(f"    [{color}]{escape(result.reason)}[/]", soft_wrap=True)
        if not self._total and "auto" in result.effective:
            self.print_note(f"    chosen: {result.effective['auto']['reason']}")

    def print_note(self, text: str, style: str = "dim") -> None:
        """Print something worth knowing."""
        self.console.print(f"[{style}]{escape(text)}[/]", soft_wrap=True)

    def print_defect(self, where: str, error: BaseException) -> None:
        """Print an error that is nobody's input: ours, with its trace."""
        self.console.print(f"[red]a defect in ladezeit, in {escape(where)}:[/]")
        self.console.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)

    def print_renderable(self, what: RenderableType) -> None:
        """Print a table or another drawing."""
        self.console.print(what)


def _figures(result: Result) -> str:
    parts = []
    for name, words in (
        ("load/total_s", "load"),
        ("inference/first_token_s", "first token"),
        ("validation/total_s", "validation"),
    ):
        if name in result.metrics:
            parts.append(f"{words} {result.metrics[name]:.3f} s")
    return "".join(f"  {part}" for part in parts)
