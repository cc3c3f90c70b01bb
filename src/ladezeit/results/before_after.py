"""The origin case's question, answered wherever a sweep holds both sides: what did the manager itself cost?"""

from collections.abc import Sequence

from ladezeit.errors import LadezeitError
from ladezeit.result import Result, Status
from ladezeit.results.difference import compare

BEFORE = "legacy_manager"
AFTER = "cuda_fp16"


def sentences(results: Sequence[Result]) -> list[str]:
    """Return one sentence a model and cache state that names the phase which makes the manager slower than its cure."""
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        if result.status is Status.ok:
            where = (result.config["model"]["name"], result.config["cache"]["state"])
            groups.setdefault(where, {}).setdefault(result.config["loading"]["name"], []).append(result)
    said = []
    for group in groups.values():
        if BEFORE in group and AFTER in group:
            try:
                said.append(compare(group[BEFORE], group[AFTER]).sentence)
            except LadezeitError:
                continue  # the two differ in more than the method: another sweep's question
    return said
