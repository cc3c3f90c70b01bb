"""`ladezeit.trace`: a load function of one's own, measured."""
