"""`python -m irl_align`, the same as the command `irl-align`."""

from irl_align.cli.main import main

main()
