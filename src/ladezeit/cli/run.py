"""The console script `ladezeit`: a Hydra application whose every job is one measured load.

Exit codes: 0 every sample ok, 1 some not ok, 2 usage (nothing was started), 3 none ok, 130 interrupted.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ladezeit.cli import help
from ladezeit.config.compose import refuse_credentials
from ladezeit.config.hydra_support import register_schemas
from ladezeit.errors import USAGE, LadezeitError
from ladezeit.redaction import redact_text

OK, SOME_NOT_OK, NONE_OK, INTERRUPTED = 0, 1, 3, 130


#: Why a single run was refused. Kept here because Hydra prints a line of its own for what a task raises.
_refusal: Exception | None = None


def run(composed: DictConfig) -> float:
    """Hydra's task function: measure one composed configuration; what is refused leaves no folder behind."""
    from ladezeit.sweep.job import run_job as measure

    global _refusal
    try:
        return measure(composed)
    except (LadezeitError, OmegaConfBaseException) as refusal:
        _refusal = refusal
        _remove_empty(Path(HydraConfig.get().runtime.output_dir))
        return float("inf")


def _remove_empty(folder: Path) -> None:
    """Remove a run's folder that holds nothing but Hydra's own files, which show what was refused as it was typed."""
    if {entry.name for entry in folder.iterdir()} <= {".hydra"}:
        shutil.rmtree(folder)


def main() -> None:
    """Entry of the console script."""
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    if help.is_help_requested(arguments):
        print(help.help_text(arguments))
        return OK
    register_schemas()
    _register_sweeper()
    signal.signal(signal.SIGTERM, _interrupt)
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra prints errors its own way and exits with 1; told to raise them, it leaves both to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        for argument in arguments:  # before Hydra writes them down
            refuse_credentials(argument, argument.lstrip("+~").partition("=")[0])
        hydra.main(version_base="1.3", config_path="pkg://ladezeit.conf", config_name="config")(run)()
        if _refusal is not None:
            raise _refusal
        return _exit_code()
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        return INTERRUPTED
    except (LadezeitError, HydraException, OmegaConfBaseException, OSError) as error:
        if wants_trace:
            raise
        from ladezeit.config.hydra_support import explain_error

        print(redact_text(f"ladezeit: {explain_error(error)}"), file=sys.stderr)
        return USAGE
    finally:
        if "ladezeit.sweep.session" in sys.modules:  # importing it takes half a second, which help need not wait for
            from ladezeit.sweep.session import close_session

            close_session()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM end everything as Ctrl-C does: the worker dies, what was measured is kept, runs are closed."""
    raise KeyboardInterrupt


def _register_sweeper() -> None:
    """Make the sweeper known to Hydra, which finds plugins by walking a namespace that editable installs hide.

    The scan comes first: it runs plugin modules anew, and classes imported before it would not be those it knows.
    """
    plugins = Plugins.instance()
    from hydra_plugins.ladezeit_sweeper.sweeper import LadezeitSweeper

    plugins.register(LadezeitSweeper)


def _exit_code() -> int:
    """Return what the measured samples amount to; OK where nothing was to be measured (``--help``, ``--cfg``)."""
    if "ladezeit.sweep.session" not in sys.modules:
        return OK
    from ladezeit.results.records import Status
    from ladezeit.sweep.session import current_session

    session = current_session()
    ok = sum(result.status is Status.ok for result in session.results)
    if ok == session.planned:
        return OK
    return SOME_NOT_OK if ok else NONE_OK
