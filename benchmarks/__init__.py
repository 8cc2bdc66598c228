"""Side by side with what a user would otherwise run: `python -m benchmarks --help`.

No speed without a proof in the same run, and no number without its company: where, when, with
what, and from which commit.
"""
