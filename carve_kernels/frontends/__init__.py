"""Published methods, a module for each with the names of its own program, and recipes; see docs/frontends.md."""
