"""ladezeit's option groups: a folder is a group, a file is an option. Installed as ``ladezeit.conf``."""
