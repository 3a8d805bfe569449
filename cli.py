"""Run the command line from a checkout: `python cli.py ...`."""

from codebook.__main__ import start

if __name__ == "__main__":  # training starts processes that import this file again
    start()
