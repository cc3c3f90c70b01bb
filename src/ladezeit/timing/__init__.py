"""Clock, resources and profiler of a measured process."""
