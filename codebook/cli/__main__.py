"""`python -m codebook.cli`: the same as `codebook`."""

from codebook.cli import main

if __name__ == "__main__":
    main()
