"""The ways to search a configuration for an accuracy weight. Imports nothing, so that the schema can name them."""

SEARCH_METHODS = {
    "exact": "exact thresholds, coordinate descent from many starts",
    "onepass": "DyCE's onepass: each position set once, in order of depth",
    "circular": "DyCE's circular: the best single change, again and again",
    "samethres": "DyCE's samethres: one head type and one threshold for all positions",
}
"""Name -> meaning; `dynexit.search.methods` has the functions."""
