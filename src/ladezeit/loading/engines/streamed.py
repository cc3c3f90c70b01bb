"""The engine `streamed`, ladezeit's own reader: what is known of it; `ladezeit.loading.streamed` holds the rest.

It works on torch's tensors throughout, so that only the one who makes it imports it.
"""

from typing import TYPE_CHECKING

from ladezeit.config.engines import ServerFlags
from ladezeit.loading.base import EngineSpec
from ladezeit.loading.streamed.arguments import StreamedLoading

if TYPE_CHECKING:
    from ladezeit.loading.streamed.engine import StreamedEngine


def _make() -> "StreamedEngine":
    from ladezeit.loading.streamed.engine import StreamedEngine

    return StreamedEngine()


ENGINES = (
    EngineSpec(
        name="streamed",
        arguments=StreamedLoading,
        make=_make,
        servers=ServerFlags(
            None,
            None,
            "ladezeit's own reader, which servers do not have; the nearest are runai_streamer and fastsafetensors",
        ),
    ),
)
