"""The commands of `ladezeit-results`, by what they are for."""
