"""From results on disk to tables and pictures; never imports torch."""
