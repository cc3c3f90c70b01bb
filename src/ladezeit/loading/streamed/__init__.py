"""Our own reader: large parallel reads, past the page cache or out of it, as each part of the checkpoint needs.

``plan`` cuts the shards into extents, ``residency`` asks which of them are in memory, ``files`` reads one, ``readers``
runs many at once; ``memory`` and ``staging`` are where the bytes land: host memory, or a device behind a pinned ring.
"""
