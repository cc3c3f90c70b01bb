"""How a checkpoint gets into memory: one module an engine, one protocol, one registry."""
