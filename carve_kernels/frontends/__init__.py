"""Published methods on this package: a module for each, with the names of its own program; see docs/frontends.md."""
