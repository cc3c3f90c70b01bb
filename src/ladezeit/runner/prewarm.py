"""The server that `prewarmed` samples are forked from: libraries imported, GPU never touched.

    python -m ladezeit.runner.prewarm <descriptor of its socket>

Requests and answers are JSON documents, one a message, each request answered before the next is read.
``{"import": model_config}`` imports the model's class and answers with the seconds that took; ``{"run": path,
"origin_ns": …, "environment": …}``, sent with the descriptors of the event pipe and the log, forks a worker and answers
with its pid; ``{"wait": pid}`` answers with the exit status of one that has ended. The server ends when its socket
closes, and a running worker with it.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from ladezeit.errors import OutOfMemoryError, WorkerError, exit_where_memory_ends, ran_out_of_memory
from ladezeit.runner import worker
from ladezeit.system.lifetime import die_with_parent
from ladezeit.system.limits import ended_for_memory, kernel_kills
from ladezeit.system.processes import set_variables

_MESSAGE_BYTES = 1 << 20
_END_S = 5.0
#: The most that a fork, or the status of a worker that has ended, is waited for; imports may take as long as a sample.
_ANSWER_S = 60.0
#: The longest that a socket can wait for, about: time limits may be infinite.
_LONGEST_S = 1e6

#: Lets `torch.cuda.is_available` ask the driver's management library: CUDA, once called, does not survive a fork.
_NO_CUDA_CALLS = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class NoAnswerError(WorkerError):
    """A process that was asked for something does not answer, and does not end either: stopped, or hung."""


class PrewarmServer:
    """The supervisor's side: starts the server, asks it for imports and workers, and ends it.

    Every method that asks raises `NoAnswerError` where no answer came in time, and `WorkerError` where the server has
    ended or could not do it: such a server is of no more use.
    """

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._kills_before = kernel_kills()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ladezeit.runner.prewarm", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment, **_NO_CUDA_CALLS},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.import_s = 0.0

    def import_libraries(self, model_config: dict[str, Any], limit_s: float) -> float:
        """Import what loading that model needs; return the seconds it took (0 where it was there already)."""
        answer = self._ask({"import": model_config}, limit_s)
        self.import_s += answer["seconds"]
        return float(answer["seconds"])

    def start_worker(self, spec: Path, origin_ns: int, events: int, log: int, environment: dict[str, str]) -> int:
        """Fork a worker for the sample that `spec` describes; return its pid, which is also its process group.

        `environment` is added to the worker's.
        """
        request = {"run": str(spec), "origin_ns": origin_ns, "environment": environment}
        return int(self._ask(request, _ANSWER_S, [events, log])["pid"])

    def wait_worker(self, pid: int) -> int:
        """Return the exit code of a worker that has ended, negative for a signal; its pid may be another's then."""
        return os.waitstatus_to_exitcode(self._ask({"wait": pid}, _END_S)["status"])

    def close(self) -> None:
        """End the server; a worker that still runs dies with it."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
            return
        self._process.kill()
        self._process.wait()

    def _ask(self, request: dict[str, Any], limit_s: float, descriptors: list[int] | None = None) -> dict[str, Any]:
        message = b""
        self._socket.settimeout(min(limit_s, _LONGEST_S))
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors or [])
            message = self._socket.recv(_MESSAGE_BYTES)
        except TimeoutError:
            raise NoAnswerError(f"the server for prewarmed samples gave no answer within {limit_s:g} s") from None
        except OSError:
            pass  # it ended, with a message unread perhaps
        if not message:
            raise WorkerError(self._gone()) from self._why_gone()
        answer: dict[str, Any] = json.loads(message)
        if "error" in answer:
            cause = OutOfMemoryError(answer["error"]) if answer["out_of_memory"] else None
            raise WorkerError(f"the prewarmed server could not do what it was asked: {answer['error']}") from cause
        return answer

    def _why_gone(self) -> OutOfMemoryError | None:
        code = self._process.poll()
        ended = code is not None and ended_for_memory(code, self._kills_before)
        return OutOfMemoryError("memory ran out in it") if ended else None

    def _gone(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)  # its socket closes a moment before it has ended
        return f"the server for prewarmed samples has ended (exit code {self._process.poll()}): see {self.log}"


def serve_requests(connection: socket.socket) -> None:
    """Answer requests until the other side closes."""
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 2)
        if not message:
            return
        request = json.loads(message)
        if "import" in request:
            answer = _import(request["import"])
        elif "run" in request:
            answer = _fork(connection, request, *descriptors)
        else:
            answer = {"status": os.waitpid(request["wait"], 0)[1]}
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more: the next request is none
            connection.send(json.dumps(answer).encode())


def _import(model_config: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    try:
        _import_torchao()
        from ladezeit.model.classes import model_class

        model_class(model_config)
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise WorkerError("the GPU was touched by an import; use process=fresh")
    except Exception as error:
        return _failed(error)
    gc.freeze()
    return {"seconds": time.monotonic() - started}


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}", "out_of_memory": ran_out_of_memory(error)}


def _import_torchao() -> None:
    """Import torchao, where it is installed, without the GPU that it would ask for its kinds of kernels.

    `transformers` imports it with any model. Only this import must not see the GPU: others remember what they saw.
    """
    with set_variables({"CUDA_VISIBLE_DEVICES": ""}), contextlib.suppress(ImportError, AttributeError):
        import_module("torchao.prototype.safetensors.safetensors_support")
        import_module("torch.utils._triton").has_triton.cache_clear()


def _fork(connection: socket.socket, request: dict[str, Any], events: int, log: int) -> dict[str, Any]:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        pid = os.fork()
    except OSError as error:
        answer = _failed(error)
    else:
        if pid == 0:
            _be_worker(connection, request, events, log)
        answer = {"pid": pid}
    os.close(events)
    os.close(log)
    return answer


def _be_worker(connection: socket.socket, request: dict[str, Any], events: int, log: int) -> None:
    """Turn this forked process into a worker; never returns."""
    started_ns = time.monotonic_ns()
    code = 1
    try:
        die_with_parent()
        os.setsid()
        connection.close()
        os.environ.update(request["environment"])
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = worker.run_worker(Path(request["run"]), events, request["origin_ns"], started_ns)
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as leaving:  # a library's own way to end a process
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main(arguments: list[str]) -> None:
    """Entry of ``python -m ladezeit.runner.prewarm``."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with exit_where_memory_ends():
        serve_requests(socket.socket(fileno=int(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
