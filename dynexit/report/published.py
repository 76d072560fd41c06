"""Operating points that the authors of JEI-DNN recorded, to draw beside a study's own.

published.csv holds those of the curves in Regol et al., ICLR 2024 (arXiv 2310.09163), read from the result files in the
authors' public repository: accuracy on the whole test set in percent, mean cost in millions by their own counter, and
the setting, which is ce_ic_tradeoff for jei_dnn and the step of MSDNet's procedure for the others. A sweep that the
repository keeps in another backbone's folder (its costs exceed that backbone's) is left out.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("published.csv")
# Data set, backbone, image size -> name in the file, and the bare backbone's cost by the authors' counter. It charges a
# linear layer for one token and no attention, so only relative costs can be set beside ours.
_STUDIES = {
    ("cifar10", "t2t_vit_7", 224): ("cifar10_t2t_7", 13.502),
    ("cifar10", "t2t_vit_14", 224): ("cifar10_t2t_14", 45.813),
    ("cifar100", "t2t_vit_7", 224): ("cifar100_t2t_7", 13.525),
    ("cifar100", "t2t_vit_14", 224): ("cifar100_t2t_14", 45.848),
    ("cifar100_lt", "t2t_vit_7", 224): ("cifar100LT_t2t_7", 13.525),
    ("cifar100_lt", "t2t_vit_14", 224): ("cifar100LT_t2t_14", 45.848),
    ("svhn", "t2t_vit_7", 32): ("svhn_t2t_7", 4.2135),
}
ORIGIN = (
    "published: what the authors of JEI-DNN recorded for this data set and backbone (Regol et al., ICLR 2024; result "
    "files of their repository), accuracy on the whole test set. Their costs are over their own count of the bare "
    "backbone, which charges a linear layer for one token and leaves attention out: an exit's place on the axis can "
    "differ from ours by up to 0.13."
)


@dataclass(frozen=True)
class PublishedPoint:
    """`accuracy` in [0, 1]; `relative_macs` over the same authors' cost of their bare backbone, by their counter."""

    method: str
    accuracy: float
    relative_macs: float


def published_points(data: str, backbone: str, image_size: int, *, thin_test: bool = True) -> list[PublishedPoint]:
    """The recorded points of this data set and backbone, by method and rising cost; none where there are none.

    Those of cifar100_lt were recorded on its thinned test set and are no match for another.
    """
    key = (data, backbone, image_size)
    if key not in _STUDIES or (data == "cifar100_lt" and not thin_test):
        return []
    study, full_cost = _STUDIES[key]
    with _FILE.open(encoding="utf-8", newline="") as file:
        points = [
            PublishedPoint(row["method"], float(row["accuracy_percent"]) / 100, float(row["cost_millions"]) / full_cost)
            for row in csv.DictReader(file)
            if row["study"] == study
        ]
    return sorted(points, key=lambda point: (point.method, point.relative_macs))
