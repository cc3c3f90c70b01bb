"""The tokenizer of a checkpoint's folder."""

import os
from pathlib import Path
from typing import Any

from ladezeit.errors import CheckpointError

#: Of transformers' tokenizers; each set of files makes one.
_TOKENIZERS = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
    {"tekken.json"},
    {"vocab.txt"},
    {"vocab.json", "merges.txt"},
)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a checkpoint's folder has the files of a tokenizer."""
    there = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    return any(names <= there for names in _TOKENIZERS)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint's folder, None where it has none; no code of the checkpoint is run.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as cause:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read: {cause}. Fetch the checkpoint again, or use inference=none"
        ) from cause
