"""One module a command of `ladezeit-results`; each has a function `command` and imports what is heavy inside it."""
