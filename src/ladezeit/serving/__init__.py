"""What a program uses: models loaded in its own process, by the measured method, and proven. No Hydra, no MLflow."""
