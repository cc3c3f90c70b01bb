"""The console script `ladezeit-results`: what measured samples say, without torch.

Exit codes: 0 answered ("not distinguishable" is an answer), 1 a regression (`check` alone), 2 usage: nothing to read,
or not to be compared.
"""

import typer

from ladezeit.cli.results_commands import check, compare, hand_over, reap, report, rerun, show, sync, ui, verdict
from ladezeit.errors import run_as

app = typer.Typer(
    name="ladezeit-results",
    help="Compare, judge and report measured samples. Reads sweep folders, results and MLflow experiments.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("compare")(compare.command)
app.command("verdict")(verdict.command)
app.command("check")(check.command)
app.command("report")(report.command)
app.command("hand-over")(hand_over.command)
app.command("show")(show.command)
app.command("rerun")(rerun.command)
app.command("sync")(sync.command)
app.command("reap")(reap.command)
app.command("ui")(ui.command)


@app.callback()
def _several_commands() -> None:
    """Keep the command's name on the command line, however many commands there are."""


def main() -> None:
    """Entry of the console script."""
    run_as("ladezeit-results", app)


if __name__ == "__main__":
    main()
