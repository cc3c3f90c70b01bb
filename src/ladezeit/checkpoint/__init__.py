"""What lies on disk: resolve, headers, identity, page cache."""
