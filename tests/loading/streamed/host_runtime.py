"""A device whose CUDA runtime is `host_runtime.c`: the native readers run as beside a GPU, and copy for real."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ladezeit.loading.streamed.device import HostDevice
from ladezeit.loading.streamed.native_readers import Runtime
from required_parts import require

#: In the order of `native_readers.RUNTIME_FUNCTIONS`, and the read.
_FUNCTIONS = (
    *("set_device", "register", "unregister", "alloc", "free", "event_create", "event_destroy", "copy"),
    *("event_record", "event_synchronize", "last_error", "read"),
)


@cache
def library() -> ctypes.CDLL:
    """Compile the runtime and load it."""
    compiler = shutil.which("cc")
    require(compiler, "no C compiler")
    made = Path(tempfile.mkdtemp(prefix="ladezeit-host-runtime-")) / "host_runtime.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([str(compiler), "-O2", "-shared", "-fPIC", "-pthread", "-o", str(made), str(source)], check=True)
    return ctypes.CDLL(str(made))


def variable(name: str) -> ctypes.c_int:
    """Return a number of the runtime, to be set or read."""
    return ctypes.c_int.in_dll(library(), f"host_{name}")


def offset(name: str) -> ctypes.c_int64:
    """Return a byte of a file that the runtime's reads compare with."""
    return ctypes.c_int64.in_dll(library(), f"host_{name}_read_at")


class NativeDevice(HostDevice):
    """Host memory that the native readers copy to."""

    def load_runtime(self) -> Runtime | None:
        found = library()
        functions = [ctypes.cast(getattr(found, f"host_{name}"), ctypes.c_void_p).value or 0 for name in _FUNCTIONS]
        return Runtime(tuple(functions), 0, 0, frozenset(), lambda code: f"error {code} of the host")
