"""`python -m distill3d` is the command `distill3d`."""

from distill3d.cli.main import main

main()
