"""Our own reader: large parallel reads, past the page cache or out of it, as each part of the checkpoint needs.

``plan`` cuts the shards into extents and decides for each by what is in memory, ``files`` reads one, ``readers`` runs
many at once; ``host`` and ``staging`` are where the bytes land: host memory, or a device behind a pinned ring.
``placing`` knows where merged and cast tensors go, ``memory`` makes tensors of bytes.
"""
