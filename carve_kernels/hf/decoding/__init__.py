"""Greedy decoding with captured attention."""
