"""Data sets as three splits; every sample carries its index."""

from dynexit.data.folders import check_class_order
from dynexit.data.sets import describe_data, load_data
from dynexit.data.splits import Batch, DataSets, Split, Workers, epoch_batches, load_batches, workers_of
from dynexit.data.transforms import check_colours

__all__ = [
    "Batch",
    "DataSets",
    "Split",
    "Workers",
    "check_class_order",
    "check_colours",
    "describe_data",
    "epoch_batches",
    "load_batches",
    "load_data",
    "workers_of",
]
