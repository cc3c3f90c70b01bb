"""One measured load: the process that measures, and those who start, watch and end it."""
