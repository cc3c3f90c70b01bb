"""A model manager that takes most of its time for nothing, to be traced: the mistakes of a real one in 50 lines.

    ladezeit-trace examples/slow_manager.py:ModelManager.load --checkpoint tiny --samples 5

It loads with good settings, reads them twice, and then walks all modules to look for broken weights: each module
checks every weight below it, value by value, so that each value is looked at once for every level above it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

SETTINGS = Path(__file__).with_name("slow_manager_settings.json")


class ModelManager:
    """Loads one model at a time."""

    def __init__(self) -> None:
        self.settings = self._read_settings()

    def load(self, folder: str) -> PreTrainedModel:
        """Load the model in `folder`, and make sure that it is all there."""
        settings = self._read_settings()  # again: nobody knew that __init__ has them
        model = AutoModelForCausalLM.from_pretrained(folder, **settings)
        self._walk_all_modules(model)
        return model

    @staticmethod
    def _read_settings() -> dict[str, Any]:
        return dict(json.loads(SETTINGS.read_text(encoding="utf-8"))["loading"])

    @staticmethod
    def _walk_all_modules(model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            for weight in module.parameters():  # those of all modules below it, too
                if weight.is_meta or not all(map(math.isfinite, weight.flatten().tolist())):
                    raise RuntimeError(f"{name} has a weight that was not loaded")
