"""Benchmarks beside what a user would otherwise run: `python -m benchmarks --help`.

Every result is compared with its reference before it is timed, in the same run; every row has its
conditions: commit, date, versions, device.
"""
