"""Is anything slower than it was, or no longer proven? New results held against a baseline, for CI."""
