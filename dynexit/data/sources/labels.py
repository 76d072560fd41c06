"""The labels of images in a CSV file, for folders without a folder per class."""

import collections
import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path, PurePath

from dynexit.data.file_tree import some
from dynexit.errors import UserError, counted
from dynexit.files import read_text

_COLUMNS = ("file", "label")


def read_labels(given: str, root: Path, split_names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns by split the label of each file, relative to `root`. Without a column `split` all are in train.

    `given` is looked for in `root`, then in the working directory. Other columns are ignored. Raises UserError for a
    missing file or column, empty and unknown values, and duplicated files.
    """
    what = f"data.labels = {given}"
    try:
        path = next(path for path in (root / Path(given).expanduser(), Path(given).expanduser()) if path.exists())
        lines = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""), strict=True)
        rows = list(lines)
    except StopIteration:
        raise UserError(
            f"{what}: there is no such file in {root} or in the working directory; give a CSV file"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{what}: cannot be read as CSV ({error}); it should have the columns file and label") from None
    columns = lines.fieldnames or ()
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise UserError(
            f"{what}: has no column {' and no column '.join(missing)} (its first line is {','.join(columns)!r}); that "
            "line should name file and label"
        )
    splits: dict[str, dict[str, str]] = {}
    names: list[str] = []
    for number, row in enumerate(rows, 2):
        file, label = (row[name].strip() if row[name] else "" for name in _COLUMNS)
        if not file or not label:
            raise UserError(f"{what}: row {number} has no {'label' if file else 'file'}; complete or remove it")
        split = split_names.get((row["split"] or "").strip().lower()) if "split" in columns else "train"
        if split is None:
            raise UserError(f"{what}: row {number} has split {row['split']!r}; allowed are train, val and test")
        names.append(os.path.normpath(file))
        splits.setdefault(split, {})[names[-1]] = label
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{what}: {counted(len(twice), 'file is', 'files are')} duplicated ({some(twice)}); give each file one row"
        )
    if "train" not in splits:
        raise UserError(f"{what}: lists no {'training ' * bool(names)}images; give a row per image")
    return splits


def check_labelled_files(given: str, root: Path, splits: Mapping[str, Mapping[str, str]]) -> None:
    """Raises UserError if files are missing, or not below `root`."""
    names = [name for split in splits.values() for name in split]
    outside = [name for name in names if PurePath(name).is_absolute() or PurePath(name).parts[0] == ".."]
    if outside:
        raise UserError(
            f"data.labels = {given}: {len(outside)} of {len(names)} files are not below data.dir ({some(outside)}); "
            "give their paths relative to it"
        )
    unknown = [name for name in names if not (root / name).is_file()]
    if unknown:
        raise UserError(
            f"data.labels = {given}: {len(unknown)} of {len(names)} files are not in {root} ({some(unknown)}); correct "
            "their paths, which are relative to data.dir, or remove them"
        )


def are_numbers(labels: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether all labels are whole numbers, which are then the indices of the classes."""
    return all(label.isdecimal() for split in labels.values() for label in split.values())
