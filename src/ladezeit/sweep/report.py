"""The report that every sweep ends with; what goes wrong in it costs the sweep a line, and nothing else."""

from pathlib import Path

from ladezeit.console.display import Display

#: Where it lies in the sweep's folder, and what its files are called.
FOLDER = "report"
NAME = "report"


def write_report(folder: Path, display: Display) -> Path | None:
    """Write the report on the sweep in `folder` into its folder ``report`` and return that.

    None where there is no report; why is said on the display.
    """
    try:
        from ladezeit.results.reading import read_paths
        from ladezeit.results.report.document import build
        from ladezeit.results.report.writing import write

        page = write(build(read_paths([folder])), folder / FOLDER, NAME)[1]
    except Exception as error:  # a picture of the results must never cost the results
        display.note(
            f"no report was written ({type(error).__name__}: {error}); "
            f"the results are complete: ladezeit-results report {folder}",
            "yellow",
        )
        return None
    display.note(f"report: {page}", "default")
    return folder / FOLDER
