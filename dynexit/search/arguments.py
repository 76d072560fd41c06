"""The options of `dynexit search-records`; imports nothing, so that --help is instant."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them; `search_records(**options_of(parsed))` in `command.py` takes what comes out."""
    files = parser.add_argument_group("files")
    record = "record to {}: a directory of shards or DyCE's .npz"
    files.add_argument("--train", type=Path, required=True, metavar="T", help=record.format("search on"))
    files.add_argument(
        "--val", type=Path, required=True, metavar="V", help=record.format("judge on (and certify risk)")
    )
    files.add_argument("--macs", type=Path, required=True, metavar="M.json", help="costs.json or DyCE's macs_info")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the two files written")
    files.add_argument("--latency", type=Path, metavar="L.json", help="times per stage, the cost instead of MACs")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--accuracy-weights", metavar="LO:HI:STEP", help="weights of accuracy against cost, HI included"
    )
    search.add_argument("--method", default="exact", choices=("exact", "onepass", "circular", "samethres"))
    search.add_argument("--normalize", action="store_true", help="map accuracy and MACs to [0, 1] first, as DyCE does")
    search.add_argument(
        "--exit-confidence",
        default="max_probability",
        choices=("max_probability", "margin", "entropy", "gate"),
        help="what is compared with a threshold (default: %(default)s)",
    )
    search.add_argument("--workers", type=int, default=1, help="threads; the answer does not depend on it")
    search.add_argument("--starts", type=int, default=4, help="random starts on small records (default: %(default)s)")
    search.add_argument("--seed", type=int, default=0, help="of the random starts (default: %(default)s)")
    search.add_argument(
        "--no-refine",
        dest="refine",
        action="store_false",
        help="thresholds between bins of confidences alone: often better on other samples where records are small",
    )
    budgets = parser.add_argument_group("budgets", "each adds an entry; may be given several times")
    for flag, text in (
        ("--relative-macs", "best accuracy within this share of the backbone's MACs"),
        ("--relative-latency", "best accuracy within this share of the backbone's time; needs --latency"),
        ("--min-accuracy", "cheapest with at least this accuracy, in [0, 1]"),
        ("--max-accuracy-drop", "cheapest that loses at most this accuracy"),
    ):
        budgets.add_argument(flag, type=float, action="append", default=[], metavar="X", help=text)
    budgets.add_argument("--risk", type=float, metavar="X", help="cheapest whose risk is certified to be at most this")
    budgets.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="X",
        help="of the certificate of --risk (default: %(default)s)",
    )


def options_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `search_records` in what was parsed; other commands' options are left out."""
    own = argparse.ArgumentParser(add_help=False)
    add_arguments(own)
    names = [action.dest for action in own._actions]
    return {name: value for name, value in vars(parsed).items() if name in names}
