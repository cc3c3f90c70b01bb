"""The Hydra sweeper that knows all points before the first is measured."""
