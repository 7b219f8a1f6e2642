"""`python -m fp_lab`."""

from fp_lab.cli import main

main()
