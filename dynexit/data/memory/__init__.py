"""Decoded images in memory, and transforms in the parts that act on them in batches."""
