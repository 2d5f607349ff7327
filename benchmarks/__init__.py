"""Measure FastFlow against the published graph and against anomalib: python -m benchmarks (see README.md here)."""
