"""A transformers model in memory: its tensors, its class, greedy decoding."""
