"""``python -m ladezeit.results``: the console script, where it is not installed as one."""

from ladezeit.results.app import main

main()
