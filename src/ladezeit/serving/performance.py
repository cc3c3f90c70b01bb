"""The process's performance settings (threads, matrix precision, …): read once, applied once, before the first load."""

import os
import sys
import threading
from typing import Any

from ladezeit.config import RuntimeConfig
from ladezeit.sample import runtime
from ladezeit.serving.settings import ModelSettings


class Performance:
    """Settings that are the same for all models of a process; `effective` is what torch said was in effect after."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.effective: dict[str, Any] | None = None
        self.applied = 0
        self._lock = threading.Lock()
        if "torch" not in sys.modules and config != RuntimeConfig():
            os.environ.update(runtime.import_environment(config))  # what torch reads as it is imported

    def apply(self, settings: ModelSettings) -> None:
        """Apply them where that was not done; raises `ConfigError` where one did not take effect."""
        with self._lock:
            if self.applied:
                return
            device = "cpu" if settings.device == "cpu" else _device()
            self.effective = runtime.apply(self.config, device)
            self.applied += 1


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
