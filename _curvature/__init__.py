"""What curvature.py is made of, one idea a file. Private."""
