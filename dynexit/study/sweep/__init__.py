"""The sweep of a study. Imports no torch."""
