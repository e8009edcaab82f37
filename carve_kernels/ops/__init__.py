"""The public functions: check the arguments, resolve the room, run it, return a typed result."""
