"""The console script `ladezeit`: a Hydra application whose every job is one measured load.

Exit codes: 0 every sample ok, 1 some not ok, 2 usage (nothing was started), 3 none ok, 130 interrupted.
"""

import contextlib
import math
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from ladezeit.cli import help
from ladezeit.config.compose import refuse_credentials
from ladezeit.config.hydra_support import register_schemas
from ladezeit.errors import USAGE, ConfigError, LadezeitError
from ladezeit.redaction import redact_text

OK, SOME_NOT_OK, NONE_OK, INTERRUPTED = 0, 1, 3, 130

#: Signals that end a run as Ctrl-C does.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


#: Why a single run was refused. Kept here because Hydra prints a line of its own for what a task raises.
_refusal: Exception | None = None

#: When the first signal came that ends everything, and for how long further ones are not obeyed, in seconds.
_interrupted_at = -math.inf
_CLOSING_S = 60.0


def run(composed: DictConfig) -> float:
    """Hydra's task function: measure one composed configuration; what is refused leaves no folder behind."""
    from ladezeit.sweep.job import run_job as measure

    global _refusal
    if _refusal is not None:  # its folder is another's
        return float("inf")
    try:
        return measure(composed)
    except (LadezeitError, OmegaConfBaseException) as refusal:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        _refusal = refusal
        _remove_empty(Path(HydraConfig.get().runtime.output_dir))
        return float("inf")


class ClaimRunFolder(Callback):
    """Hydra's callback before a single run: refuses a folder that is in use, before Hydra writes its files into it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Have ${hydra:…} in the folder's name resolved for sweepers that do not see to that."""
        HydraConfig.instance().set_config(config)

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Claim ``hydra.run.dir``, which is kept until the process ends."""
        from ladezeit.sweep.claim import FolderClaim

        global _refusal
        HydraConfig.instance().set_config(config)  # for ${hydra:…} in the folder's name
        try:
            FolderClaim(Path(str(config.hydra.run.dir)))
        except ConfigError as refusal:
            # A callback cannot stop a run: Hydra is told to write nothing, and the task to do nothing.
            _refusal = refusal
            with read_write(config.hydra):
                config.hydra.output_subdir = None
        except OSError:
            pass  # Hydra makes the folder next, and says why it cannot


def _remove_empty(folder: Path) -> None:
    """Remove a run's folder that holds nothing but Hydra's own files, which show what was refused as it was typed."""
    if {entry.name for entry in folder.iterdir()} <= {".hydra"}:
        shutil.rmtree(folder)


def main() -> None:
    """Entry of the console script."""
    code = _main(sys.argv[1:])
    if code == INTERRUPTED:
        # Everything is closed. The interpreter puts back what ends a process at the next signal, but leaves alone what
        # is ignored: one more Ctrl-C meanwhile must not change the exit code.
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _main(arguments: list[str]) -> int:
    if help.is_help_requested(arguments):
        return _print_help(arguments)
    register_schemas()
    _register_sweeper()
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
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
    except Exception as error:
        from ladezeit.config.hydra_support import explain_error, is_usage_error

        if wants_trace or not is_usage_error(error):
            raise

        print(redact_text(f"ladezeit: {explain_error(error)}"), file=sys.stderr)
        return (_exit_code() or SOME_NOT_OK) if _started() else USAGE
    finally:
        if "ladezeit.sweep.session" in sys.modules:  # importing it takes half a second, which help need not wait for
            from ladezeit.sweep.session import close_session

            close_session()


def _print_help(arguments: list[str]) -> int:
    """Print the help page; a reader that left (``ladezeit --help | head``) is no error."""
    try:
        print(help.help_text(arguments), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
    return OK


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM and a closed terminal end everything as Ctrl-C does: the worker dies, results stay, runs are closed.

    What comes while that goes on would only leave runs open and processes behind: it is answered, not obeyed, unless
    the end takes very long.
    """
    global _interrupted_at
    if number == signal.SIGHUP:
        _leave_terminal()
    if time.monotonic() - _interrupted_at < _CLOSING_S:
        with contextlib.suppress(OSError):
            os.write(2, b"ending: closing what was measured (Ctrl-\\ leaves at once)\n")
        return
    _interrupted_at = time.monotonic()
    raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Write to nowhere from now on, where a terminal was written to: it is closed, and every line would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _register_sweeper() -> None:
    """Make the sweeper known to Hydra, which finds plugins by walking a namespace that editable installs hide.

    The scan comes first: it runs plugin modules anew, and classes imported before it would not be those it knows.
    """
    plugins = Plugins.instance()
    from hydra_plugins.ladezeit_sweeper.sweeper import LadezeitSweeper

    plugins.register(LadezeitSweeper)


def _started() -> bool:
    """Say whether any sample was started: what goes wrong then is no usage error."""
    if "ladezeit.sweep.session" not in sys.modules:
        return False
    from ladezeit.sweep.session import current_session

    return current_session().started


def _exit_code() -> int:
    """Return what the measured samples amount to; OK where nothing was to be measured (``--help``, ``--cfg``)."""
    if "ladezeit.sweep.session" not in sys.modules:
        return OK
    from ladezeit.results.records import Status
    from ladezeit.sweep.session import current_session

    session = current_session()
    ok = sum(result.status is Status.ok for result in session.results)
    if ok == max(session.planned, len(session.results)):  # other sweepers do not say how many there will be
        return OK
    return SOME_NOT_OK if ok else NONE_OK
