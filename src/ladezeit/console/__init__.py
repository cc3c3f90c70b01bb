"""What a person types and reads: the console scripts, their help, their errors, the live lines."""
