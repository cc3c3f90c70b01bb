"""What a program uses: models loaded in its own process, by the measured method, and verified. No Hydra, no MLflow."""
