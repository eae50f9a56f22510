"""`benchmark.py training`: `DampedNewton` against rivals at their best settings."""
