"""The level `logits`: first-token logits and greedy continuation against the reference's, after the sample's tokens.

It comes after the measured first tokens, because it would do for them what a loader put off until then.
"""

from typing import Any

from ladezeit.validation.faults import Fault
from ladezeit.validation.logits.reference import Reference
from ladezeit.validation.logits.spoken import speak
from ladezeit.validation.proof import Finding, Look

#: What no forward survives unchanged; of other faults it finds those that this prompt happens to feel.
CLAIMS = frozenset(
    {
        Fault.nan_in_file,
        Fault.planted_nan,
        Fault.missing_tensor,
        Fault.buffer_on_meta,
        Fault.weight_on_meta,
        Fault.overwritten_buffer,
    }
)


def look(model: Any, reference: Reference) -> Look:
    """Let the model continue the reference's prompt, and compare."""
    spoken = speak(model)
    apart = reference.spoken.difference(spoken)
    said, sure = reference.spoken.agreed(spoken), reference.sure_tokens
    findings = []
    if not apart <= reference.tolerance:
        what = f"are up to {apart:.3g} from the reference's, where {reference.tolerance:.3g} are let pass"
        findings.append(Finding("logits", "", f"the first token's {what}"))
    if said < sure:
        what = f"{spoken.token_ids} where the reference says {reference.spoken.token_ids}, the first {sure} for sure"
        findings.append(Finding("tokens", "", f"the greedy continuation is {what}"))
    every = len(spoken.token_ids)
    return Look(
        claim=f"first-token logits within {apart:.3g} of a reference load on this device "
        f"(two reference loads: {reference.noise:.3g}), {said} of {every} greedy tokens equal ({sure} are sure to be)",
        findings=findings,
        metrics={
            "validation/logits_difference": apart,
            "validation/logits_tolerance": reference.tolerance,
            "validation/tokens_equal": float(said == every),
        },
    )
