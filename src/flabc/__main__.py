"""``python -m flabc``: the command line."""

from flabc.cli import main

main()
