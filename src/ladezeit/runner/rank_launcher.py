"""Starts the ranks of one sample, as torchrun would, and ends all of them when one is lost.

    python -m ladezeit.runner.rank_launcher <worker.json> <descriptor of the event pipe> <asked for at, monotonic ns>

To the supervisor it is the worker: one process whose group holds all ranks. It imports nothing but the standard
library, so that it costs a load next to nothing, and sleeps until a rank ends. Each rank writes what it finds into a
folder of its own; only when all have ended well does rank 0's become the sample's, so that nobody reads a result of
which a part is missing.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ladezeit.system.lifetime import die_with_parent, signal_name

#: Names the rank that was lost, for whoever explains the end of the sample.
LOST_FILE = "lost_rank.json"
RESULT_FILE = "result.json"
#: How long the others may go on after rank 0 has ended well.
_GRACE_S = 30.0


def rank_folder(sample: Path, rank: int) -> Path:
    """Return the folder that a rank writes to; removed with the sample's scratch folder."""
    return sample / "scratch" / f"rank-{rank}"


def lost_rank(sample: Path) -> int | None:
    """Return the rank that took the sample's other ranks with it; None where there was none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads((sample / LOST_FILE).read_text(encoding="utf-8"))["rank"])
    return None


def main(arguments: list[str]) -> int:
    """Entry of ``python -m ladezeit.runner.rank_launcher``; the exit code of the lost rank, 0 with a result."""
    die_with_parent()
    signal.signal(signal.SIGUSR1, lambda *_: None)  # asks the ranks for their stacks; this process has none to tell
    plain = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    folder, ranks = Path(plain["folder"]), int(plain["config"]["loading"]["ranks"])
    for rank in range(ranks):
        shutil.rmtree(rank_folder(folder, rank), ignore_errors=True)  # what an earlier attempt left counts for nothing
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = [_start(rank, ranks, arguments, listener, plain["device"]) for rank in range(ranks)]
    lost = _first_lost(started)
    if lost is None:
        _keep(folder, 0)
        return 0
    for process in started:
        process.kill()
    for process in started:
        process.wait()
    if (rank_folder(folder, lost) / RESULT_FILE).exists():
        first = first_to_report(folder, ranks)
        lost = lost if first is None else first
    print(f"rank {lost} of {ranks} was lost ({_end_of(started[lost])}); the others were ended", file=sys.stderr)
    if (rank_folder(folder, lost) / RESULT_FILE).exists():
        _name_the_rank(rank_folder(folder, lost) / RESULT_FILE, lost)
        _keep(folder, lost)
        return 0
    (folder / LOST_FILE).write_text(json.dumps({"rank": lost}), encoding="utf-8")
    return started[lost].returncode


def first_to_report(sample: Path, ranks: int) -> int | None:
    """Return the rank that was the first to write of an error, None where none did.

    The others lose their connection to it and report that. A process with a GPU takes so long to end that one of them
    may have ended before it.
    """
    reports = []
    for rank in range(ranks):
        path = rank_folder(sample, rank) / RESULT_FILE
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8"))["error"] is not None:
                reports.append((path.stat().st_mtime_ns, rank))
    return min(reports)[1] if reports else None


def _start(
    rank: int, ranks: int, arguments: list[str], listener: socket.socket, device: str
) -> "subprocess.Popen[bytes]":
    """Start one rank; rank 0 gets the listening socket itself, so that nobody can take its port meanwhile."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
    }
    if rank == 0:
        environment["LADEZEIT_STORE_FD"] = str(listener.fileno())
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # transformers would put the ranks on any GPU that it finds
    defaults = {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ladezeit.runner.worker", *arguments],
        stdin=subprocess.DEVNULL,
        env={**defaults, **os.environ, **environment},
        pass_fds=[int(arguments[1]), *([listener.fileno()] if rank == 0 else [])],
    )


def _first_lost(started: "list[subprocess.Popen[bytes]]") -> int | None:
    """Sleep until all ranks have ended (None), or the first of them not well: return that one."""
    with selectors.DefaultSelector() as selector:
        for rank, process in enumerate(started):
            selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, rank)
        patience_s: float | None = None
        while selector.get_map():
            ended = [key for key, _ in selector.select(patience_s)]
            if not ended:  # rank 0 has left its result, and the others do not come to an end
                for process in started:
                    process.kill()
                return None
            # A rank that reports its own error comes before those that only noticed its absence.
            for key in ended:
                selector.unregister(key.fileobj)
                os.close(key.fd)
                if started[key.data].wait() != 0:
                    return int(key.data)
                patience_s = _GRACE_S if key.data == 0 else patience_s
    return None


def _keep(sample: Path, rank: int) -> None:
    """Make what a rank wrote the sample's, its result last."""
    for path in sorted(rank_folder(sample, rank).glob("*"), key=lambda path: path.name == RESULT_FILE):
        if path.is_file():
            path.replace(sample / path.name)


def _name_the_rank(path: Path, rank: int) -> None:
    plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    plain["reason"] = f"rank {rank}: {plain['reason']}"
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _end_of(process: "subprocess.Popen[bytes]") -> str:
    code = process.returncode
    return signal_name(-code) if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code < 0:  # end as the rank ended, so that the supervisor sees the same
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
