"""``python -m mxq``."""

from mxq.cli import main

main()
