"""One measured load: the process that does it, and the one that watches it."""
