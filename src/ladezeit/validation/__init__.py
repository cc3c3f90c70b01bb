"""Whether a loaded model is the one that was asked for, and what it costs to know."""
