"""The engine `auto`: looks at checkpoint, page cache and device, chooses an engine by a table of rules, and loads.

The table is data: reports and documentation print it, and what it says about speed was measured (docs/engines.md names
the files). The first rule whose condition holds and whose engine can run here decides; the last one always can.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ladezeit.checkpoint.files import brings_adapter
from ladezeit.config import DType, LoadingConfig
from ladezeit.config.engines import ServerFlags, arguments_class
from ladezeit.errors import NotRunnableError
from ladezeit.loading import registry
from ladezeit.loading.base import Engine, EngineModel, EngineSpec, LoadRequest
from ladezeit.model.classes import has_own_code
from ladezeit.system.residency import filesystem_type, sampled_share
from ladezeit.timing.clock import Clock


@dataclass
class AutoLoading(LoadingConfig):
    """No arguments: engine and arguments are chosen by what is found (see `RULES`)."""

    engine: str = "auto"


#: File systems whose files come over a network, where many reads in flight hide the way there and back.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "9p", "gpfs", "beegfs", "glusterfs", "virtiofs")


@dataclass(frozen=True)
class Facts:
    """What is known before a load.

    `device` is ``cpu`` or ``cuda``; `resident_share`: about how much of the shards is in the page cache, NaN where the
    system does not tell; `own_class`: the model's class is transformers' own; `adapter`: one is to
    be added to the weights; `keeps_dtype`: nothing is to be cast.
    """

    device: str
    file_format: str
    filesystem: str
    resident_share: float
    weight_bytes: int
    tensor_count: int
    keeps_dtype: bool
    quantised: bool
    own_class: bool
    adapter: bool = False


@dataclass(frozen=True)
class Rule:
    """Which engine with which arguments where `when` holds; `condition` and `why` say both in words."""

    condition: str
    when: Callable[[Facts], bool]
    engine: str
    why: str
    arguments: dict[str, Any] = field(default_factory=dict)


RULES: tuple[Rule, ...] = (
    Rule(
        "the weights are pickled files",
        lambda facts: facts.file_format != "safetensors",
        "transformers",
        "no other engine reads them safely",
        {"device_map": "device"},
    ),
    Rule(
        "the checkpoint is quantized",
        lambda facts: facts.quantised,
        "transformers",
        "its quantizer decides what becomes of each tensor",
        {"device_map": "device"},
    ),
    Rule(
        "the model's class is the checkpoint's own code",
        lambda facts: not facts.own_class,
        "transformers",
        "only it runs that code",
        {"device_map": "device"},
    ),
    Rule(
        "an adapter lies beside the weights",
        lambda facts: facts.adapter,
        "transformers",
        "only it adds the adapter",
        {"device_map": "device"},
    ),
    Rule(
        "the files come over a network",
        lambda facts: facts.filesystem in _NETWORK or facts.filesystem.startswith("fuse."),
        "streamed",
        "many large reads in flight hide the way to the server and back",
        {"threads": 16},
    ),
    Rule(
        "anything else",
        lambda facts: True,
        "streamed",
        "it maps or copies what is in memory, reads the rest past the page cache, and merges and casts on the way",
    ),
    Rule(
        "streamed cannot run here",
        lambda facts: True,
        "transformers",
        "it runs everywhere",
        {"device_map": "device"},
    ),
)


@dataclass(frozen=True)
class Choice:
    """What was chosen, by which rule (its number counts from 1), and why, in one line."""

    engine: str
    arguments: dict[str, Any]
    rule: int
    reason: str


def choose_engine(facts: Facts) -> Choice:
    """Return what the table says."""
    for number, rule in enumerate(RULES, start=1):
        if rule.when(facts) and _runs(rule.engine, facts):
            reason = f"{rule.engine}, because {_describe_facts(facts)} and {rule.condition}: {rule.why}"
            if rule.condition == "anything else":
                reason = f"{rule.engine}, because {_describe_facts(facts)}: {rule.why}"
            return Choice(rule.engine, dict(rule.arguments), number, reason)
    raise NotRunnableError(f"loading=auto found no engine for {facts}: choose one with loading=")


def rule_table() -> list[tuple[int, str, str, str]]:
    """Return the rules as rows: number, condition, engine with its arguments, why."""
    rows = []
    for number, rule in enumerate(RULES, start=1):
        arguments = " ".join(f"{name}={value}" for name, value in rule.arguments.items())
        rows.append((number, rule.condition, f"{rule.engine} {arguments}".strip(), rule.why))
    return rows


def collect_facts(request: LoadRequest) -> Facts:
    """Return the facts about a request; takes milliseconds and changes nothing."""
    checkpoint, asked = request.checkpoint, request.loading.dtype
    return Facts(
        device=request.device.partition(":")[0],
        file_format=checkpoint.file_format,
        filesystem=filesystem_type(checkpoint.shards[0]),
        resident_share=sampled_share(checkpoint.shards),
        weight_bytes=checkpoint.weight_bytes,
        tensor_count=len(checkpoint.tensors),
        keeps_dtype=asked in (DType.auto, DType.__members__.get(checkpoint.dtype)),
        quantised=checkpoint.config.get("quantization_config") is not None,
        own_class=not (request.trust_remote_code and has_own_code(checkpoint.config)),
        adapter=brings_adapter(checkpoint.folder),
    )


class AutoEngine:
    """Chooses inside the clock: who lets an engine be chosen for them pays for the choice."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}

    def prepare(self, request: LoadRequest) -> None:
        """Import and prepare every engine that may be chosen here: that is not loading."""
        facts = collect_facts(request)
        for rule in RULES:
            if rule.engine not in self._engines and _runs(rule.engine, facts):
                self._engines[rule.engine] = registry.make_engine(rule.engine)
                self._engines[rule.engine].prepare(_request(request, rule.engine, rule.arguments))

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        """See `Engine.load`; `effective` tells the choice and the facts that it was made by."""
        with clock.span("load/choose"):
            facts = collect_facts(request)
            choice = choose_engine(facts)
        loaded = self._engines[choice.engine].load(_request(request, choice.engine, choice.arguments), clock)
        share = facts.resident_share
        seen = {**asdict(facts), "resident_share": None if math.isnan(share) else share}  # JSON has no NaN
        loaded.effective["auto"] = {**asdict(choice), "facts": seen}
        return loaded


def _request(request: LoadRequest, engine: str, arguments: dict[str, Any]) -> LoadRequest:
    asked = request.loading
    loading = arguments_class(engine)(
        name=asked.name,
        engine=engine,
        dtype=asked.dtype,
        disable_cpu_offload=asked.disable_cpu_offload,
        **arguments,
    )
    return replace(request, loading=loading)


def _runs(engine: str, facts: Facts) -> bool:
    try:
        registry.check_engine(engine, facts.device, facts.file_format)
    except NotRunnableError:
        return False
    return True


def _describe_facts(facts: Facts) -> str:
    share = facts.resident_share
    cached = "nobody tells what is in memory" if math.isnan(share) else f"about {share:.0%} is in memory"
    cast = "" if facts.keeps_dtype else ", the dtype changes"
    size = f"{facts.weight_bytes / 1e9:.2f} GB in {facts.tensor_count} tensors"
    return f"{cached}{cast}, {size} lie on {facts.filesystem} and go to {facts.device}"


ENGINES = (
    EngineSpec(
        name="auto",
        arguments=AutoLoading,
        make=AutoEngine,
        formats=("safetensors", "pickle"),
        servers=ServerFlags(
            None, None, "chosen anew at each load: hand over what it chose (effective.engine of a sample)"
        ),
    ),
)
