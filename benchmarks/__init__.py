"""Measurements side by side, each run from the checkout as `python -m benchmarks.<room>.<module>`; `--help` says how.

`cost` has time and memory of single pieces, `experiments` questions that the papers leave open, `publish` the tables
of the documentation, `faults` spoiled files, kills and threads.
"""
