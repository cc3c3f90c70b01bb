"""Many samples: from composed configs to results, in order, whatever dies meanwhile."""
