"""Engines that misbehave, each in one real way, for the supervisor to survive: ``engines_for_tests:Name``."""

import ctypes
import errno
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.errors import LoadError
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.loading.engines.quantized import QuantizedEngine
from ladezeit.loading.engines.tensor_parallel import TensorParallelEngine
from ladezeit.loading.engines.transformers import TransformersEngine
from ladezeit.loading.formats.tensorizer import TensorizerConverter
from ladezeit.system import page_cache
from ladezeit.timing.clock import Clock


class Hangs(TransformersEngine):
    """Sleeps for ever inside a phase, deaf to SIGTERM, with a child that does the same."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (request.scratch.parent / "child.pid").write_text(str(child.pid))
        with clock.span("load/read"):
            time.sleep(600)
        raise AssertionError


class Daemons(TransformersEngine):
    """Starts processes that go their own ways, and then ends as the file ``end`` beside the sample says."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        folder = request.scratch.parent
        sleep = ["sleep", "600"]
        for name, own in (("plain", False), ("own session", True)):
            child = subprocess.Popen(sleep, start_new_session=own)
            (folder / f"{name}.pid").write_text(str(child.pid))
        orphan = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
        told = subprocess.check_output([sys.executable, "-c", orphan], env={"HOME": "/"}, start_new_session=True)
        (folder / "orphan without an environment.pid").write_bytes(told)
        end = (folder / "end").read_text()
        if end == "crash":
            ctypes.string_at(0)
        if end == "hang":
            time.sleep(600)
        return super().load(request, clock)


class KilledFromOutside(TransformersEngine):
    """Dies of SIGKILL in the middle of the load."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        print("last words before the end", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Crashes(TransformersEngine):
    """Reads address 0."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        ctypes.string_at(0)
        raise AssertionError


class EndsBySignal(TransformersEngine):
    """Dies of the signal whose number is in the file ``signal`` beside the sample."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        number = int((request.scratch.parent / "signal").read_text())
        if number == signal.SIGSEGV:
            faulthandler.disable()
        os.kill(os.getpid(), number)
        raise AssertionError


class FillsItsControlGroup(TransformersEngine):
    """Takes memory until the kernel ends it."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        taken = []
        while True:
            taken.append(b"x" * 2**24)


class WritesItsOwnResult(TransformersEngine):
    """Leaves a result that nobody can read, and ends."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        (request.scratch.parent / "result.json").write_text('{"status": "o')
        os._exit(0)


class RemovesItsFolder(TransformersEngine):
    """Loads well, and loses the folder that its result belongs in."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        shutil.rmtree(request.scratch.parent)
        return loaded


class RemovesTheSweep(TransformersEngine):
    """Loads well, and loses the folder of the whole sweep."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        shutil.rmtree(request.scratch.parent.parent)
        return loaded


class EndsByARealTimeSignal(TransformersEngine):
    """Dies of a signal that has no name."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        os.kill(os.getpid(), signal.SIGRTMIN + 3)
        raise AssertionError


class TellsTooMuch(TransformersEngine):
    """Writes more to its log than anybody reads: as many mebibytes as the file ``mebibytes`` says."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        os.write(2, b"the first words\n")
        line = b"0123456789abcde\n" * 2**16
        for _ in range(int((request.scratch.parent / "mebibytes").read_text())):
            os.write(2, line)
        os.write(2, b"the last words\n")
        return super().load(request, clock)


class TellsOddThings(TransformersEngine):
    """Reports what no JSON file can hold."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch

        loaded = super().load(request, clock)
        loaded.effective["odd"] = {
            "nan": float("nan"), "infinite": [float("inf")], "dtype": torch.float16, "path": Path("/a"),
            "surrogate": "a\udcffb", 7: {3}, ("a", 1): torch.tensor(2.5),
        }  # fmt: skip
        return loaded


class FindsNoProcess(TransformersEngine):
    """Is refused a process by a system that has no memory for one."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        raise RuntimeError("no reader could be started") from OSError(errno.ENOMEM, "Cannot allocate memory")


class Leaves(TransformersEngine):
    """Ends the process without a word."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        os._exit(7)


class RunsOutOfMemory(TransformersEngine):
    """Asks for more host memory than there can be."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        with clock.span("load/read"):
            bytearray(1 << 62)
        raise AssertionError


class FillsTheGpu(TransformersEngine):
    """Wraps a full GPU in an error of its own, as an engine does that says what to do about it."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch

        with clock.span("load/read"):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB.")
            except RuntimeError as cause:
                raise LoadError("14.00 GiB do not fit on cuda:0, which has 11.00 GiB free") from cause


class FillsTheHost(TransformersEngine):
    """Asks torch's host allocator for more than there can be."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch

        with clock.span("load/read"):
            torch.empty(2**50, dtype=torch.uint8)
        raise AssertionError


class FillsTheHostWriting(TensorizerConverter):
    """A converter that asks for more than there can be."""

    def write_files(self, checkpoint: Checkpoint, folder: Path, told: Callable[[int], None]) -> None:
        import torch

        torch.empty(2**50, dtype=torch.uint8)


class TellsItsGpus(TransformersEngine):
    """Says which GPUs its process was given."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        loaded.effective["gpus_given"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        return loaded


class AbortsForMemory(TransformersEngine):
    """Ends as a library in C++ does that cannot have memory: the runtime says why, and aborts."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
        os.abort()


class Raises(TransformersEngine):
    """Has a defect."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        with clock.span("load/read"):
            raise RuntimeError("the engine broke\nwith details")


class ForgetsTheHead(TransformersEngine):
    """Loads, then unties the head, as a loader that copies tensors one by one does."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        head = loaded.model.get_output_embeddings()
        head.weight = type(head.weight)(head.weight.detach().clone())
        return loaded


class WarmsTheCache(TransformersEngine):
    """Reads the shards before the clock starts, so that a cold sample is not cold."""

    def prepare(self, request: LoadRequest) -> None:
        for shard in request.checkpoint.shards:
            shard.read_bytes()


class LosesTheCache(TransformersEngine):
    """Has the shards forgotten before the clock starts, as a system does that wants its memory back."""

    def prepare(self, request: LoadRequest) -> None:
        page_cache.drop_pages(request.checkpoint.shards)


class Steady(TransformersEngine):
    """Loads slowly enough to be interrupted in the middle, and then well."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        with clock.span("load/read"):
            time.sleep(1.5)
        return super().load(request, clock)


class ComparesWithThePlainLoad(TensorParallelEngine):
    """Loads its part, puts all ranks' parts together and compares each weight with the plain load's, bit for bit."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch
        from transformers import AutoModelForCausalLM

        loaded = super().load(request, clock)
        plain = AutoModelForCausalLM.from_pretrained(request.checkpoint.folder).state_dict()
        whole = {
            name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).cpu()
            for name, weight in loaded.model.state_dict().items()
        }
        assert whole.keys() == plain.keys()
        differing = [name for name, weight in whole.items() if not torch.equal(weight, plain[name])]
        parts = [name for name, weight in loaded.model.state_dict().items() if hasattr(weight, "to_local")]
        loaded.effective["compared"] = {"equal": len(whole) - len(differing), "differing": differing, "split": parts}
        return loaded


class LosesARank(TensorParallelEngine):
    """Rank 1 dies of SIGKILL while rank 0 waits for it."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(request, clock)


class OneRankRefuses(TensorParallelEngine):
    """Rank 1 finds that its part is not what was asked for."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        if os.environ["RANK"] == "1":
            raise LoadError("a weight is missing")
        return loaded


class OneRankIsFull(TensorParallelEngine):
    """Rank 1's GPU has no memory left, which torch says as it does on one."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch

        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB.")
        return super().load(request, clock)


class OneRankUnties(TensorParallelEngine):
    """Rank 1 holds its head as a tensor of its own."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        if os.environ["RANK"] == "1":
            from torch.nn import Parameter

            head = loaded.model.get_output_embeddings()
            head.weight = Parameter(head.weight.detach().clone(), requires_grad=False)
        return loaded


class OneRankHangs(TensorParallelEngine):
    """Rank 1 never comes to the end of its load, deaf to SIGTERM; rank 0 waits for it."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        (request.scratch.parent / "pid").write_text(str(os.getpid()))
        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        return super().load(request, clock)


class FlipsABit(TransformersEngine):
    """Loads, then flips the lowest bit of one weight, as bad memory does."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch

        loaded = super().load(request, clock)
        weight = loaded.model.model.norm.weight
        weight.data = weight.data.clone()
        weight.data.view(torch.int16)[3] ^= 1
        return loaded


class FlipsACode(QuantizedEngine):
    """Loads quantised, then flips the lowest bit of one code, as bad memory does."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        loaded = super().load(request, clock)
        loaded.model.model.layers[0].mlp.up_proj.weight.data.view(-1)[77] ^= 1
        return loaded


class OneRankHoldsAnothersPart(TensorParallelEngine):
    """Rank 1 reads the part that is rank 0's, of one weight."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch.distributed as dist

        loaded = super().load(request, clock)
        part = loaded.model.model.layers[1].mlp.down_proj.weight.data.to_local()
        sent = part.clone()
        dist.broadcast(sent, src=0)
        part.copy_(sent)
        return loaded


class OneRankSplitsOtherwise(TensorParallelEngine):
    """Rank 1 holds its half of the columns of a weight of which rank 0 holds its half of the rows."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        import torch
        from torch.distributed.tensor import DTensor, Shard

        loaded = super().load(request, clock)
        module = loaded.model.model.layers[1].mlp.gate_proj
        whole = module.weight.full_tensor()
        if os.environ["RANK"] == "1":
            half = whole.chunk(2, 1)[1].contiguous()
            other = DTensor.from_local(half, module.weight.device_mesh, [Shard(1)], run_check=False)
            module.weight = torch.nn.Parameter(other, requires_grad=False)
        return loaded


class Dawdles(TransformersEngine):
    """Loads as it should, and counts to a large number before."""

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        self._count(3.0)
        return super().load(request, clock)

    def _count(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(10_000))
