"""`python -m mxdit.cli`, where the `mxdit` script is not on the path."""

from mxdit.cli import main

main()
