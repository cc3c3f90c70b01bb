"""What a manager holds at one moment, as data for a status page."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ladezeit.serving.budget import NOTHING, Account, Bytes
from ladezeit.serving.loading_turn import LoadingTurn, method_of
from ladezeit.serving.resident import Resident
from ladezeit.serving.rooms import Rooms
from ladezeit.serving.settings import ManagerSettings, ModelSettings

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True)
class ModelStatus:
    """One model: `state` is ``loaded``, ``loading``, ``failed`` or ``not loaded``.

    `uses` counts the leases that are open, `loads` how often it was loaded so far. `load_s`, `validation_s` (what the
    proof cost, inside of `load_s`), `method` and `proof` are those of the load it is in memory by.
    """

    state: str
    validation: str
    loads: int
    uses: int = 0
    size: Bytes = NOTHING
    load_s: float | None = None
    validation_s: float | None = None
    method: str | None = None
    proof: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class ManagerStatus:
    """All models by name; bytes charged and budgets (None: what is free); performance settings as torch has them.

    `still_held` names models that were unloaded and whose tensors somebody holds: they are charged until these go.
    """

    models: dict[str, ModelStatus]
    charged: Bytes
    gpu_budget: int | None
    host_budget: int | None
    still_held: list[str]
    runtime: dict[str, Any] | None
    at_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)


def status_of(settings: ManagerSettings, rooms: Rooms, pending: "Collection[str]", turn: LoadingTurn) -> ManagerStatus:
    """Return the status; the caller holds the manager's lock."""
    account: Account = rooms.budget.account
    models = {
        name: _model(each, rooms.residents.get(name), name in pending, turn) for name, each in settings.models.items()
    }
    return ManagerStatus(
        models=models,
        charged=account.used,
        gpu_budget=account.gpu_limit,
        host_budget=account.host_limit,
        still_held=[charge.rpartition("#")[0] for charge in rooms.given_up],
        runtime=turn.performance.effective,
        at_s=time.time(),
    )


def _model(settings: ModelSettings, resident: Resident | None, loading: bool, turn: LoadingTurn) -> ModelStatus:
    name = settings.name
    loads = turn.loads[name]
    if resident is None:
        error = turn.failures.get(name)
        state = "loading" if loading else "failed" if error else "not loaded"
        return ModelStatus(state, settings.validation, loads, error=error)
    proof: Any = getattr(resident.loaded, "proof", None)
    return ModelStatus(
        state="loaded",
        validation=settings.validation,
        loads=loads,
        uses=resident.leased,
        size=resident.size,
        load_s=resident.seconds,
        validation_s=proof.total_s if proof is not None else None,
        method=method_of(resident.loaded),
        proof=proof.reason if proof is not None else None,
    )
