"""The measured process: it loads one model, verifies it, generates with it, writes ``result.json``, and ends.

    python -m ladezeit.runner.worker <worker.json> <descriptor of the event pipe> <when it was asked for, monotonic ns>

Phases are told to the supervisor through the pipe as they open, one JSON document a line. Nothing else leaves the
process while a clock runs: no network, no MLflow, no log but the worker's own.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ladezeit.errors import exit_where_memory_ends
from ladezeit.results.records import save_result
from ladezeit.runner.sample import Sample
from ladezeit.runner.spec import WorkerSpec
from ladezeit.system.lifetime import die_with_parent

#: Sent by the supervisor before it ends a worker: the stacks of all threads go to the log.
STACKS_SIGNAL = signal.SIGUSR1

RANK_FAILED = 3


def run_worker(spec_path: Path, event_descriptor: int, origin_ns: int, started_ns: int) -> int:
    """Be a worker process: measure one sample and return the exit code.

    0: a result was written, whatever it says. `RANK_FAILED`: this is a rank whose error ends the others too. Where
    there was no memory to write one, the process leaves with `MEMORY_FULL`.
    """
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    os.set_blocking(event_descriptor, False)

    def notify(path: str) -> None:
        # A full pipe means that nobody is looking: progress is dropped rather than waited for.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(event_descriptor, (json.dumps({"phase": path}) + "\n").encode())

    with exit_where_memory_ends():
        spec = WorkerSpec.read_spec(spec_path)
        sample = _sample(spec, origin_ns, notify)
        sample.clock.record_phase("process_start", origin_ns, started_ns)
        result = sample.run_sample()
        save_result(result, sample.spec.folder)
    is_rank = sample.spec is not spec
    return RANK_FAILED if is_rank and result.error is not None else 0


def _sample(spec: WorkerSpec, origin_ns: int, notify: Callable[[str], None]) -> Sample:
    if spec.config.loading.process_count == 1:
        return Sample(spec, origin_ns, notify)
    from ladezeit.runner.ranks import RankSample

    return RankSample(spec, origin_ns, notify)


def main(arguments: list[str]) -> int:
    """Entry of ``python -m ladezeit.runner.worker``."""
    started_ns = time.monotonic_ns()
    die_with_parent()
    code = run_worker(Path(arguments[0]), int(arguments[1]), int(arguments[2]), started_ns)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    # A torn-down CUDA context and freed gigabytes are nobody's measurement: the result is on disk, so leave at once.
    os._exit(main(sys.argv[1:]))
