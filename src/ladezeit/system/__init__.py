"""The machine: files, memory, devices, page cache, processes. Knows no model."""
