"""ladezeit: the fastest correct way to get a Hugging Face language model onto your GPU, found, proven and kept."""

__version__ = "0.1.0"
