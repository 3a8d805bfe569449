"""The command line by `python -m codebook`, as where its script is not on the path."""

from codebook.cli import main

if __name__ == "__main__":  # processes that training starts import this file again
    main()
