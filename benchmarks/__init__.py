"""What benchmark.py is made of: one measurement a file."""
