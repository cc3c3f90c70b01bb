"""What a user loses if this breaks: weights under the names the library gives them, and a third of a small load."""

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
from transformers import core_model_loading

from ladezeit.loading.transformers_patches import LazyPattern, lazy_patterns

_OF_A_NEW_PROCESS = """
import json, re, sys
import torch
from transformers import conversion_mapping as library, core_model_loading
from ladezeit.loading.transformers_patches import lazy_patterns

with lazy_patterns():
    library.get_checkpoint_conversion_mapping("")
own = library._checkpoint_conversion_mapping_cache
theirs = library._build_checkpoint_conversion_mapping()
pairs = [
    (mine.compiled_sources, its.compiled_sources)
    for name in theirs
    for mine, its in zip(own[name], theirs[name], strict=True)
    if hasattr(its, "compiled_sources")
]
compiled = sum(mine.is_compiled for mine, _ in pairs)
print(json.dumps({
    "architectures": [sorted(own), sorted(theirs)],
    "kinds": [name for name in theirs if list(map(type, own[name])) != list(map(type, theirs[name]))],
    "expressions": len(pairs),
    "late": sum(type(mine).__name__ == "LazyPattern" for mine, _ in pairs),
    "compiled": compiled,
    "other": [its.pattern for mine, its in pairs if mine.expression != its],
    "module_is_back": core_model_loading.re is re,
}))
"""


def test_the_table_is_the_librarys_own_and_compiles_nothing_that_nobody_asked_for() -> None:
    """Every architecture, every rename and every expression is the library's; none was compiled to build it."""
    done = subprocess.run([sys.executable, "-c", _OF_A_NEW_PROCESS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["architectures"][0] == found["architectures"][1]
    assert found["kinds"] == found["other"] == []
    assert found["expressions"] == found["late"] > 500
    assert found["compiled"] == 0
    assert found["module_is_back"]


def test_another_release_compiles_its_expressions_as_it_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without the attribute that is known here must load all the same."""
    monkeypatch.delattr(core_model_loading, "re")
    with lazy_patterns():
        assert not hasattr(core_model_loading, "re")
    assert not hasattr(core_model_loading, "re")


def test_an_error_in_the_block_leaves_the_library_as_it_was() -> None:
    """A load that fails must not change how the program's own models are loaded afterwards."""
    with pytest.raises(ValueError), lazy_patterns():
        assert isinstance(core_model_loading.re.compile("a"), LazyPattern)  # type: ignore[attr-defined]
        raise ValueError
    assert core_model_loading.re is re  # type: ignore[attr-defined]


def test_a_late_expression_is_the_expression() -> None:
    """Found, grouped, copied and pickled (a model is saved with its mapping) as if it had been compiled at once."""
    late = LazyPattern(r"(?P<g0>layers\.(\d+))(?!\w)")
    assert not late.is_compiled
    assert copy.deepcopy(late) is copy.copy(late) is late
    match = late.search("model.layers.7.weight")
    assert match is not None
    assert (match.group("g0"), late.groupindex["g0"], late.pattern) == ("layers.7", 1, r"(?P<g0>layers\.(\d+))(?!\w)")
    assert late.is_compiled
    assert pickle.loads(pickle.dumps(late)) == re.compile(late.pattern)
