"""transformers' conversion mapping, without the expressions of architectures that nobody loads.

The library builds one table of renames and converters for all its architectures when a process asks for the first of
them, and compiles each expression of it: 865 in transformers 5.23, which is most of the time the table takes and a
third of a warm load of a small model. Here the library builds the same table, but an expression is compiled when it is
first asked: those of the architecture that is loaded.
"""

import re
import threading
from typing import Any

#: The module's attribute is one for all threads: two that build at once must not put back each other's.
_BUILDING = threading.Lock()


class LateExpression:
    """A regular expression that is compiled when it is first used; copied and pickled as the expression it is."""

    __slots__ = ("_compiled", "_flags", "_text")

    def __init__(self, text: str, flags: int = 0) -> None:
        self._text = text
        self._flags = flags
        self._compiled: re.Pattern[str] | None = None

    def __getattr__(self, name: str) -> Any:
        """Return what the compiled expression has under this name."""
        return getattr(self.expression, name)

    @property
    def expression(self) -> re.Pattern[str]:
        """The compiled expression."""
        if self._compiled is None:
            self._compiled = re.compile(self._text, self._flags)
        return self._compiled

    @property
    def is_compiled(self) -> bool:
        """Whether it has been used."""
        return self._compiled is not None

    def __copy__(self) -> "LateExpression":
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> "LateExpression":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return re.compile, (self._text, self._flags)


class _Expressions:
    """Stands for the module `re` where a table of expressions is built."""

    compile = LateExpression

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)


def build() -> None:
    """Let the library build its table if it has none yet; afterwards it is the process's, as if it had done so alone.

    A release that compiles its expressions elsewhere builds as it always does.
    """
    from transformers import conversion_mapping, core_model_loading

    with _BUILDING:
        if getattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None) is not None:
            return
        if getattr(core_model_loading, "re", None) is not re:
            return
        core_model_loading.re = _Expressions()
        try:
            conversion_mapping.get_checkpoint_conversion_mapping("")
        finally:
            core_model_loading.re = re
