"""``python -m ladezeit``: the console script, where it is not installed as one."""

from ladezeit.cli.run import main

main()
