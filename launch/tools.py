"""Commands that need no study: what a backbone costs, a search on records alone, exchange of record formats."""

import argparse
import json
from pathlib import Path
from typing import Any

from dynexit.search.arguments import add_arguments, options_of


def add_tools(commands: Any) -> None:
    """Adds the commands to the command line."""
    macs = _tool(commands, "macs", "multiply-accumulates of a backbone up to every exit, of its heads and gates")
    macs.add_argument(
        "backbone", metavar="BACKBONE", help="a timm name of a supported family, or t2t_vit_7 and its like"
    )
    macs.add_argument("--image-size", type=_natural, metavar="PIXELS", help="default: the model's own")
    macs.add_argument("--num-classes", type=_natural, default=1000, metavar="K", help="default: %(default)s")
    macs.add_argument(
        "--positions", type=int, nargs="+", metavar="P", help="blocks with an exit; default: all but the last"
    )
    macs.add_argument(
        "--head-types", nargs="+", metavar="TYPE", help="as linear or mlp3x500; default: the papers' types"
    )
    form = macs.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, in MACs")
    form.add_argument("--dyce", action="store_true", help="print DyCE's macs_info JSON")
    macs.set_defaults(tool=_macs)
    search = _tool(commands, "search-records", "the best exit configurations for records, without any run")
    add_arguments(search)
    search.set_defaults(tool=_search_records)
    convert = _tool(commands, "convert", "a DyCE .npz into a directory of shards, or back")
    convert.add_argument("source", type=Path, metavar="SOURCE", help="a .npz or a directory of shards")
    convert.add_argument("destination", type=Path, metavar="DESTINATION", help="the other of the two")
    convert.set_defaults(tool=_convert)


def _natural(text: str) -> int:
    """The number that `text` is. Raises what argparse makes a sentence of where it is not at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)


def _tool(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    tool: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    return tool


def _search_records(options: argparse.Namespace) -> None:
    from dynexit.search.command import search_records

    search_records(**options_of(options))


def _convert(options: argparse.Namespace) -> None:
    from dynexit.dyce.npz import convert

    convert(options.source, options.destination)
    print(f"{options.source} -> {options.destination}")


def _macs(options: argparse.Namespace) -> None:
    from dynexit.models.macs import REPORTED_HEADS, dyce_macs_info, macs_report

    report = macs_report(
        options.backbone,
        image_size=options.image_size,
        num_classes=options.num_classes,
        positions=options.positions,
        head_types=options.head_types or REPORTED_HEADS,
    )
    if options.json or options.dyce:
        print(json.dumps(dyce_macs_info(report) if options.dyce else report, indent=1))
        return
    full = report["full_macs"]
    height, width = report["image_size"]
    print(f"{report['backbone']} at {height}x{width}, {report['num_classes']} classes: {full / 1e6:,.1f} M MACs")
    heads = report["head_macs"]
    print("  ".join(["position", "backbone M", "relative", "gate", *(f"{name} M" for name in heads)]))
    for p, position in enumerate(report["positions"]):
        macs = report["backbone_macs"][p]
        cells = [f"{position:8d}", f"{macs / 1e6:10,.1f}", f"{macs / full:8.3f}", f"{report['gate_macs'][p]:4d}"]
        cells += [f"{values[p] / 1e6:{len(name) + 2},.3f}" for name, values in heads.items()]
        print("  ".join(cells))
