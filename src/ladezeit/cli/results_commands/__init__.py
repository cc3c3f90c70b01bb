"""The commands of `ladezeit-results`, one file each."""
