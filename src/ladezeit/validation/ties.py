"""Whether weights that the model ties are one tensor in memory, and not two that happen to be equal."""

from typing import Any

from ladezeit.loading.parts import parts
from ladezeit.validation.proof import Expected, Finding


def untied(model: Any, expected: Expected) -> list[Finding]:
    """Return a finding for each pair of weights that the model or its config ties, and that is not one storage.

    A pair that the placement put on two devices is let pass where several devices are legitimate: a copy is the only
    way to have it on both. Weights on meta are not judged here.
    """
    findings = []
    for target, source in _pairs(model).items():
        one, other = _tensor(model, target), _tensor(model, source)
        if one is None or other is None or one.is_meta or other.is_meta or _same(one, other):
            continue
        if one.device != other.device and not expected.single_device:
            continue
        findings.append(
            Finding(
                "tie",
                target,
                f"is a tensor of its own, and the model ties it to {source}; where the checkpoint holds two different "
                f"ones, its config.json must say tie_word_embeddings=false",
            )
        )
    return findings


def _pairs(model: Any) -> dict[str, str]:
    """Return what is tied to what: transformers' own list, and the output embedding where config and class tie it.

    transformers takes a pair off its list, with a log line, where the checkpoint holds different values for the two.
    """
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if getattr(model.config, "tie_word_embeddings", False) and getattr(model, "_tied_weights_keys", None):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {id(module): name for name, module in model.named_modules() if module in (head, embedding)}
        if id(head) in names and id(embedding) in names:
            pairs.setdefault(f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight")
    return pairs


def _tensor(model: Any, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    try:
        return getattr(model.get_submodule(path), attribute, None)
    except AttributeError:
        return None


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    pairs = zip(parts(one), parts(other), strict=False)  # of two that are not one, the first parts differ already
    return bool(one.shape == other.shape and all(_same_memory(part, twin) for part, twin in pairs))


def _same_memory(one: Any, other: Any) -> bool:
    return bool(one.device == other.device and one.data_ptr() == other.data_ptr())
