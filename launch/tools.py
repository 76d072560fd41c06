"""Commands that need no study: what a backbone costs, a search on records alone, exchange of record formats."""

import argparse
import json
from pathlib import Path
from typing import Any

from dynexit.core.confidence import CONFIDENCES
from dynexit.core.search_methods import SEARCH_METHODS
from dynexit.errors import UserError
from dynexit.study.yaml_text import parse_yaml


def add_tools(commands: Any) -> None:
    """Adds the commands to the command line."""
    macs = add_command(commands, "macs", "multiply-accumulates of a backbone up to every exit, of its heads and gates")
    macs.add_argument(
        "backbone", metavar="BACKBONE", help="a timm name of a supported family, or t2t_vit_7 and its like"
    )
    macs.add_argument(
        "--arguments", type=_mapping, metavar="YAML", help="as backbone.arguments: '{channels: [8, 12, 16, 24]}'"
    )
    macs.add_argument("--image-size", type=_natural, metavar="PIXELS", help="default: the model's own")
    macs.add_argument("--num-classes", type=_natural, default=1000, metavar="K", help="default: %(default)s")
    macs.add_argument(
        "--positions", type=int, nargs="+", metavar="P", help="blocks with an exit; default: all but the last"
    )
    macs.add_argument(
        "--head-types", nargs="+", metavar="TYPE", help="as linear or mlp3x500; default: the papers' types"
    )
    macs.add_argument("--reader", metavar="NAME", help="what exits read, as exits.reader; default: the family's own")
    macs.add_argument("--concatenate", action="store_true", help="exits read what the exits before them read too")
    macs.add_argument("--stem", action="store_true", help="an exit before the first block too")
    form = macs.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, in MACs")
    form.add_argument("--dyce", action="store_true", help="print DyCE's macs_info JSON")
    macs.set_defaults(tool=_macs)
    cut = add_command(commands, "cut", "the places where exits can sit in a module of your own")
    cut.add_argument("function", metavar="package.module:function", help="returns the module, an nn.Module")
    cut.add_argument("--input", type=_shape, default=(3, 224, 224), metavar="CxHxW", help="default: 3x224x224")
    cut.set_defaults(tool=_cut)
    search = add_command(commands, "search-records", "the best exit configurations for records, without any run")
    _add_search_arguments(search)
    search.set_defaults(tool=_search_records)
    convert = add_command(commands, "convert", "a DyCE .npz into a directory of shards, or back")
    convert.add_argument("source", type=Path, metavar="SOURCE", help="a .npz or a directory of shards")
    convert.add_argument("destination", type=Path, metavar="DESTINATION", help="the other of the two")
    convert.set_defaults(tool=_convert)


def add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Adds a command, `text` its help, and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return parser


def _shape(text: str) -> tuple[int, int, int]:
    """The shape that `text` is. Raises what argparse makes a sentence of where it is no CxHxW."""
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} should be channels, height and width, as 3x224x224")
    channels, height, width = map(int, sizes)
    return channels, height, width


def _natural(text: str) -> int:
    """The number that `text` is. Raises what argparse makes a sentence of where it is not at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)


def _mapping(text: str) -> dict[str, Any]:
    """The mapping that `text` is as YAML. Raises what argparse makes a sentence of where it is none."""
    try:
        value = parse_yaml(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} should be a mapping, as '{{channels: [8, 12, 16, 24]}}'")
    return value


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    record = "record to {}: a directory of shards or DyCE's .npz"
    files.add_argument("--train", type=Path, metavar="T", help=record.format("search on"))
    files.add_argument("--val", type=Path, metavar="V", help=record.format("judge on (and certify risk)"))
    files.add_argument("--macs", type=Path, metavar="M.json", help="costs.json or DyCE's macs_info")
    files.add_argument(
        "--cascade",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="instead of those three: record/ID of two or more models on the same samples, which run in this order; "
        "their validation splits are searched, their test splits judge",
    )
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the two files written")
    files.add_argument("--latency", type=Path, metavar="L.json", help="times, the cost instead of MACs")
    files.add_argument("--batch-size", type=int, metavar="B", help="of the times of stage bench; default: the smallest")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--accuracy-weights", metavar="LO:HI:STEP", help="weights of accuracy against cost, HI included"
    )
    search.add_argument("--method", default="exact", choices=(*SEARCH_METHODS,))
    search.add_argument("--normalize", action="store_true", help="map accuracy and MACs to [0, 1] first, as DyCE does")
    search.add_argument(
        "--exit-confidence",
        default="max_probability",
        choices=(*CONFIDENCES,),
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


def _search_records(options: argparse.Namespace) -> None:
    from dynexit.jobs.search_records import CascadeFiles, RecordFiles, search_records, weights_of
    from dynexit.search.budgets import budgets_of
    from dynexit.search.driver import SearchRequest

    settings = SearchRequest(
        accuracy_weights=weights_of(options.accuracy_weights),
        budgets=budgets_of(vars(options)),
        risk=options.risk,
        risk_confidence=options.confidence,
        method=options.method,
        normalize=options.normalize,
        refine=options.refine,
        starts=options.starts,
        seed=options.seed,
        workers=options.workers,
    )
    if options.batch_size is not None and options.latency is None:
        raise UserError("--batch-size: needs --latency with the latency.json of stage bench, whose times it names")
    of_one = {f"--{name}": getattr(options, name) for name in ("train", "val", "macs", "latency")}
    if options.cascade:
        given = [flag for flag, path in of_one.items() if path is not None]
        if given:
            raise UserError(f"{', '.join(given)} and --cascade exclude each other; give one of them")
        search_records(CascadeFiles(options.cascade, options.exit_confidence), settings, options.out)
        return
    missing = [flag for flag, path in of_one.items() if path is None and flag != "--latency"]
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(missing)} (or --cascade)")
    files = RecordFiles(
        options.train, options.val, options.macs, options.latency, options.exit_confidence, options.batch_size
    )
    search_records(files, settings, options.out)


def _convert(options: argparse.Namespace) -> None:
    from dynexit.dyce.npz import convert

    convert(options.source, options.destination)
    print(f"{options.source} -> {options.destination}")


def _macs(options: argparse.Namespace) -> None:
    from dynexit.dyce.macs_info import dyce_macs_info
    from dynexit.models.macs import REPORTED_HEADS, macs_report, macs_table
    from dynexit.models.readers import Reading

    report = macs_report(
        options.backbone,
        image_size=options.image_size,
        num_classes=options.num_classes,
        positions=options.positions,
        head_types=options.head_types or REPORTED_HEADS,
        arguments=options.arguments,
        reading=Reading(options.reader, options.concatenate),
        stem=options.stem,
    )
    if options.dyce and any(report["reader_macs"]):
        raise UserError("--dyce has no place for MACs of features that several exits read; remove --concatenate")
    if options.json or options.dyce:
        print(json.dumps(dyce_macs_info(report) if options.dyce else report, indent=1))
    else:
        print(macs_table(report))


def _cut(options: argparse.Namespace) -> None:
    from dynexit.models.cut.listing import list_places
    from dynexit.study.own_code import allowing_code

    with allowing_code(options.allow_code):
        print(list_places(options.function, options.input))
