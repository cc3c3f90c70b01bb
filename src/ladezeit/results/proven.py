"""Which samples count: a time is compared only where it is proven that the right thing was loaded."""

from collections import Counter
from collections.abc import Sequence

from ladezeit.result import Result, Status
from ladezeit.results.points import why
from ladezeit.results.varying import value_of

#: Levels that leave open whether every weight is where it should be: nothing is ranked on their word.
WEAKER_THAN_PLACEMENT = ("none", "sampled", "origin_rule", "all_modules")


#: The kind of process of a load that no sweep set up.
PRODUCTION = "production"


def level_of(result: Result) -> str:
    """Return the level of validation that was asked for, as the proof or else the config names it."""
    named = (result.proof or {}).get("level") or (result.config.get("validation") or {}).get("level")
    return str(named or "unknown")


def claim_of(samples: Sequence[Result]) -> str | None:
    """Return in one sentence what the proof of a quantised or split model proves; None where its level says it all."""
    claims = (str(proof["claim"]) for result in samples if (proof := result.proof) and proof.get("claim"))
    return next(claims, None)


def doubt(result: Result) -> str | None:
    """Return in a line why an `ok` sample is not proven, None where it is (or where it is not `ok` anyway)."""
    if result.status is not Status.ok:
        return None
    if result.config.get("profile"):
        return "measured under a profiler, which takes its own time"
    return _unproven(result)


def _unproven(result: Result) -> str | None:
    proof = result.proof
    if not proof:
        return "no proof is on record"
    if not proof.get("ran"):
        return f"the proof did not run: {proof.get('reason', 'no reason given')}"
    if not proof.get("passed"):
        return f"the proof did not pass: {proof.get('reason', 'no reason given')}"
    if level_of(result) in WEAKER_THAN_PLACEMENT:
        return f"validation={level_of(result)} does not prove where every weight is; validation=placement does"
    return None


def exclusion(samples: Sequence[Result]) -> str | None:
    """Return in a line why the samples of a point are not ranked, None where they are.

    A method that loaded the wrong thing once is out, whatever its other samples say. One that failed now and then is
    ranked by what it measured; its status counts stand beside. Loads in production are shown and never ranked.
    """
    if any(value_of(result, "process") == PRODUCTION for result in samples):
        return "loaded in production, beside other work and with a page cache that nobody set: not a measurement"
    wrong = [result for result in samples if result.status is Status.wrong]
    if wrong:
        return f"{len(wrong)} of {len(samples)} wrong: {why(wrong[0])}"
    doubts = Counter(text for result in samples if (text := doubt(result)))
    if doubts:
        text, count = doubts.most_common(1)[0]
        return f"unproven ({count} of {len(samples)}): {text}"
    if not any(result.status is Status.ok for result in samples):
        first = Counter((result.status, why(result)) for result in samples).most_common(1)[0]
        (status, reason), count = first
        return f"{count} of {len(samples)} {status.value}: {reason}"
    return None
