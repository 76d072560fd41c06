"""Frozen image classifiers turned into families of early-exit networks."""
