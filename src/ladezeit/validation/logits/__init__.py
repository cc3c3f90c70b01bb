"""The level `logits`: what the model says, against a reference load on the same device."""
