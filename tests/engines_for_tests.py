"""Engines that misbehave, each in one real way, for the supervisor to survive: ``engines_for_tests:Name``."""

import ctypes
import os
import signal
import subprocess
import sys
import time

from ladezeit.loading.base import LoadedModel, LoadRequest
from ladezeit.loading.transformers_engine import TransformersEngine
from ladezeit.measure.clock import Clock


class Hangs(TransformersEngine):
    """Sleeps for ever inside a phase, deaf to SIGTERM, with a child that does the same."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (request.scratch.parent / "child.pid").write_text(str(child.pid))
        with clock.span("load/read"):
            time.sleep(600)
        raise AssertionError


class KilledFromOutside(TransformersEngine):
    """Dies of SIGKILL in the middle of the load."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        print("last words before the end", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Crashes(TransformersEngine):
    """Reads address 0."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        ctypes.string_at(0)
        raise AssertionError


class Leaves(TransformersEngine):
    """Ends the process without a word."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        os._exit(7)


class RunsOutOfMemory(TransformersEngine):
    """Asks for more host memory than there can be."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        with clock.span("load/read"):
            bytearray(1 << 62)
        raise AssertionError


class Raises(TransformersEngine):
    """Has a defect."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        with clock.span("load/read"):
            raise RuntimeError("the engine broke\nwith details")


class ForgetsTheHead(TransformersEngine):
    """Loads, then unties the head, as a loader that copies tensors one by one does."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        loaded = super().load(request, clock)
        head = loaded.model.get_output_embeddings()
        head.weight = type(head.weight)(head.weight.detach().clone())
        return loaded


class WarmsTheCache(TransformersEngine):
    """Reads the shards before the clock starts, so that a cold sample is not cold."""

    def prepare(self, request: LoadRequest) -> None:
        for shard in request.checkpoint.shards:
            shard.read_bytes()


class Steady(TransformersEngine):
    """Loads slowly enough to be interrupted in the middle, and then well."""

    def load(self, request: LoadRequest, clock: Clock) -> LoadedModel:
        with clock.span("load/read"):
            time.sleep(1.5)
        return super().load(request, clock)
