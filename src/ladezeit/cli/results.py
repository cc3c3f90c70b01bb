"""The console script `ladezeit-results`: what measured samples say, without torch.

Exit codes: 0 answered ("not distinguishable" is an answer), 1 a regression (`check` alone), 2 usage: nothing to read,
or not to be compared.
"""

import typer

from ladezeit.cli.results_commands import decide, mlflow_store, present
from ladezeit.errors import run_as

app = typer.Typer(
    name="ladezeit-results",
    help="Compare, judge and report measured samples. Reads sweep folders, results and MLflow experiments.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("compare")(decide.compare_command)
app.command("verdict")(decide.verdict_command)
app.command("check")(decide.check_command)
app.command("report")(present.report_command)
app.command("hand-over")(present.hand_over_command)
app.command("show")(present.show_command)
app.command("rerun")(present.rerun_command)
app.command("sync")(mlflow_store.sync_command)
app.command("reap")(mlflow_store.reap_command)
app.command("ui")(mlflow_store.ui_command)


@app.callback()
def _several_commands() -> None:
    """Keep the command's name on the command line, however many commands there are."""


def main() -> None:
    """Entry of the console script."""
    run_as("ladezeit-results", app)


if __name__ == "__main__":
    main()
