"""What is measured and how: clock and phases, memory, environment facts."""
