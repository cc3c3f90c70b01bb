"""The tokenizer of a checkpoint's folder."""

from pathlib import Path
from typing import Any

from ladezeit.errors import CheckpointError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.txt",
    "vocab.json",
)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint's folder, None where it has none; no code of the checkpoint is run.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as cause:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read: {cause}. Fetch the checkpoint again, or use inference=none"
        ) from cause
