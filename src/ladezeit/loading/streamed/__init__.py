"""Our own reader: large parallel reads, past the page cache or out of it, as each part of the checkpoint needs.

``plan`` cuts the shards into extents and decides for each by what is in memory, ``readers`` runs many reads at once;
``host`` and ``device`` are where the bytes land: host memory, or a device behind a pinned ring. ``layout`` knows where
merged and cast tensors go, ``memory`` reads one extent and makes tensors of bytes.
"""
