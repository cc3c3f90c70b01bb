"""The guide's code runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/in-a-service.md"])
def test_the_python_of_the_guide_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Who copies an example has one that works."""
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
    said = capsys.readouterr().out
    assert "Paris" in said and "s in all" in said and "Residency(" in said


def test_every_error_of_the_guide_is_there() -> None:
    """Names in the table of errors are names to be caught."""
    import ladezeit
    from ladezeit import errors

    named = re.findall(r"`(\w+Error)`", (ROOT / "docs/in-a-service.md").read_text())
    assert named and all(
        issubclass(getattr(errors, name, None) or getattr(ladezeit, name), errors.LadezeitError) for name in named
    )
