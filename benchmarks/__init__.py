"""What pymirror costs, each figure beside its floor: the same work in bare C, measured in the same run.

`python -m benchmarks` runs them all. cases/ holds the benchmarks, floor/ the C programs; docs/performance.md
says what they found.
"""
