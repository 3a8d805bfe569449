"""`python -m codebook.cli`: the same as `codebook`."""

from codebook.cli import main

main()
