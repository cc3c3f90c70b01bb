"""The level `content`: every tensor bit for bit what the checkpoint says it is, by digests made where they lie."""
