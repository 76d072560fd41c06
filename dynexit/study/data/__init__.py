"""The section `data` of a study, and the names of data sets. Imports no torch."""
