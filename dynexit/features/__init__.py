"""Kept features: what exits read of every image, computed once, stored, and read in place of the images."""

from dynexit.features.kept import keep_features_of

__all__ = ["keep_features_of"]
