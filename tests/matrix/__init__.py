"""The versions that people have: an environment for each, made, tried and deleted again. Standard library only."""
