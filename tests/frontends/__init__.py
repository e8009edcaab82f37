"""Frontends against renditions of the programs that they stand for."""
