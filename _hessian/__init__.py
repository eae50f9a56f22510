"""What hessian.py and newton.py are made of, one idea a file. Private: import `hessian` and `newton`."""
