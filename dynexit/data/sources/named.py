"""torchvision's data sets by name, as study/data/names.py lists them."""

from typing import Any

from dynexit.data.images import Sources
from dynexit.data.timm_sets import Indexed
from dynexit.data.torchvision_sets import data_folder, one_process_at_a_time
from dynexit.errors import Failure, UserError
from dynexit.study.data.names import TORCHVISION_SETS, check_files
from dynexit.study.schema import DataSettings


def read_torchvision(data: DataSettings) -> Sources:
    """Returns the splits that the data set has. Raises UserError for files that are missing or damaged."""
    from torchvision import datasets

    known = TORCHVISION_SETS[data.name]
    root = data_folder(data)
    check_files(data.name, data.dir, download=data.download, is_here=True)
    cls = getattr(datasets, known.class_name)
    with one_process_at_a_time(data, root):
        found = {split: _open(data, cls, root=str(root), **arguments) for split, arguments in known.splits.items()}
    sources = {split: Indexed(dataset, f"{data.name}, split {split}") for split, dataset in found.items()}
    train = sources["train"]
    return Sources(train, sources.get("test"), sources.get("validation"), train.class_names)


def _open(data: DataSettings, cls: Any, **arguments: Any) -> Any:
    try:
        return cls(download=data.download, **arguments)
    except Exception as error:  # of many kinds, by what is damaged
        reason = " ".join(str(error).split()) or type(error).__name__
        text = f"{data.name}: torchvision cannot read data.dir = {data.dir} ({type(error).__name__}: {reason})"
        if data.download and isinstance(error, OSError):  # no network or no room: another attempt may succeed
            raise Failure(f"{text}; try again, or put its files there") from None
        raise UserError(f"{text}; put complete files there, or set data.download=true in an empty folder") from None
