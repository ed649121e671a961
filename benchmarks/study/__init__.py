"""The paper's comparisons at desk scale: `python -m benchmarks.study --help`."""
