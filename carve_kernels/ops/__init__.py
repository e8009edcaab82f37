"""The public functions: check the arguments, resolve the backend, run it, return a typed result."""
