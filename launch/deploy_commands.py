"""Commands on model folders: save (from a study), predict (image files) and export (programs without dynexit)."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynexit.errors import UserError, counted
from launch.tools import add_command

if TYPE_CHECKING:
    from dynexit.deploy.model import View
    from dynexit.deploy.predict import Predictions


def add_deploy_commands(commands: Any) -> None:
    """Adds the commands to the command line."""
    save = add_command(commands, "save", "write operating points of a finished study as a model folder")
    save.add_argument("study", type=Path, metavar="STUDY.yaml")
    save.add_argument("directory", type=Path, metavar="DIR", help="the new folder")
    save.add_argument("words", nargs="*", metavar="key.path=value", help="overrides of the study's keys")
    which = save.add_mutually_exclusive_group()
    which.add_argument("--front", action="store_true", help="all points of the validation front (the default)")
    which.add_argument(
        "--relative-macs", type=float, metavar="SHARE", help="the most accurate within this share of the MACs alone"
    )
    which.add_argument(
        "--latency-ms", type=float, metavar="MS", help="the most accurate within this mean time of a batch alone"
    )
    save.add_argument("--batch-size", type=int, metavar="B", help="of --latency-ms; default: the smallest measured")
    save.add_argument("--point", metavar="ID", help="of one training, search or prepared backbone alone")
    save.set_defaults(tool=_save)
    predict = add_command(commands, "predict", "classify image files with a model folder")
    predict.add_argument("directory", type=Path, metavar="DIR", help="a folder that `dynexit save` wrote")
    predict.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="of a folder all below it")
    target = predict.add_mutually_exclusive_group()
    target.add_argument("--relative-macs", type=float, metavar="SHARE", help="most accurate within this share of MACs")
    target.add_argument(
        "--max-accuracy-drop", type=float, metavar="DROP", help="fewest MACs that lose at most this, as 0.005"
    )
    target.add_argument("--risk", type=float, metavar="RISK", help="fewest MACs whose certified risk is at most this")
    target.add_argument("--latency-ms", type=float, metavar="MS", help="most accurate within this mean time")
    target.add_argument(
        "--point",
        metavar="NAME",
        help="an operating point, as `backbone`; default: fewest MACs that lose nothing on validation",
    )
    predict.add_argument("--batch-size", type=int, default=64, metavar="B", help="default: %(default)s")
    predict.add_argument("--out", type=Path, metavar="FILE.csv", help="default: the terminal")
    predict.set_defaults(tool=_predict)
    export = add_command(commands, "export", "write a model folder as programs for other runtimes, with a router")
    export.add_argument("directory", type=Path, metavar="DIR", help="a folder that `dynexit save` wrote")
    export.add_argument("--to", choices=("onnx", "torch"), required=True, help="ONNX, or archives of torch.export")
    export.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="the new folder")
    export.add_argument("--verify", action="store_true", help="compare the programs' answers to the folder's probe")
    export.set_defaults(tool=_export)


def add_model_bench(bench: argparse.ArgumentParser) -> None:
    """Adds to the command of stage bench what it takes for a model folder in place of a study."""
    group = bench.add_argument_group("with a model folder in place of a study")
    group.add_argument("--batch", metavar="B,...", help="batch sizes; default: 1,8,64")
    group.add_argument(
        "--points", metavar="P,...", help="shares of the full model's time, or names of points; default: 0.4,0.6,0.8"
    )
    group.add_argument("--runtime", metavar="NAME,...", help="torch, optimized, compiled, onnx; default: torch")
    group.add_argument("--device", metavar="DEVICE", help="cpu (the default) or cuda")
    group.add_argument("--out", type=Path, metavar="FOLDER", help="for bench.csv, bench.json and accuracy_time.png")


def bench_folder(options: argparse.Namespace) -> bool:
    """Times a model folder if `dynexit bench` was given one. Returns whether it was.

    Raises UserError for options of the one with the other, and for a batch size that is none.
    """
    given = {name: getattr(options, name) for name in ("batch", "points", "runtime", "device", "out")}
    if not (options.study / "exits.json").is_file():
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UserError(f"--{wrong[0]} is for a model folder, and {options.study} is none (it has no exits.json)")
        return False
    if options.words or options.out is None:
        what = f"{options.words[0]} is for a study" if options.words else "--out is missing"
        raise UserError(f"{what}; for a model folder: dynexit bench DIR --out FOLDER [--batch 1,8,64] [--points 0.6]")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; name a folder")
    from dynexit.bench.model_bench import BenchRequest, bench_model
    from dynexit.study.own_code import allowing_code

    asked: dict[str, Any] = {}
    if options.batch is not None:
        asked["batch_sizes"] = [_batch_size(text) for text in options.batch.split(",")]
    if options.points is not None:
        asked["points"] = options.points.split(",")
    if options.runtime is not None:
        asked["runtimes"] = options.runtime.split(",")
    if options.device is not None:
        asked["device"] = options.device
    with allowing_code(options.allow_code):
        print(bench_model(options.study, BenchRequest(**asked), options.out))
    print(f"written to {options.out}")
    return True


def _batch_size(text: str) -> int:
    if not text.strip().isdigit() or int(text) == 0:
        raise UserError(f"--batch {text}: batch sizes are 1 or more, as 1,8,64")
    return int(text)


def _save(options: argparse.Namespace) -> None:
    from dynexit.jobs.save import run_save
    from dynexit.study.own_code import allowing_code
    from launch.api import load_study

    study = load_study(options.study, options.words)
    target = options.latency_ms
    if options.batch_size is not None:
        if target is None:
            raise UserError("--batch-size is for --latency-ms, which is missing")
        target = (target, options.batch_size)
    with allowing_code(options.allow_code):
        saved = run_save(
            study.points,
            options.directory,
            relative_macs=options.relative_macs,
            latency_ms=target,
            identity=options.point,
        )
    print(f"{options.directory}: {counted(len(saved), 'operating point')}")
    for point in saved:
        low, high = point.accuracy_interval
        accuracy = f"{100 * point.accuracy:.2f} % ({100 * low:.2f} to {100 * high:.2f})"
        times = ", ".join(f"{one.milliseconds:.3g} ms at batch {one.batch_size}" for one in point.latency)
        print(
            f"  {point.name:16} {point.relative_macs:.4f} of the MACs, validation accuracy {accuracy}"
            + f", {times}" * bool(times)
        )


def _predict(options: argparse.Namespace) -> None:
    from dynexit.deploy.model import load
    from dynexit.errors import Failure

    if "-" in options.images:
        raise UserError("`-` is no file: images are not read from standard input; give files or folders")
    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; name a file")
    model = load(options.directory, allow_code=options.allow_code)
    if options.relative_macs is not None:
        view = model.use(relative_macs=options.relative_macs)
    elif options.max_accuracy_drop is not None:
        view = model.use(max_accuracy_drop=options.max_accuracy_drop)
    elif options.risk is not None:
        view = model.use(risk=options.risk)
    elif options.latency_ms is not None:
        view = model.use(latency_ms=options.latency_ms)
    else:
        view = model.use(options.point) if options.point else model.use(max_accuracy_drop=0.0)
    found = view.predict(options.images, options.batch_size)
    if found.rows:
        _write(found, view, options.out)
    for reason in found.unreadable.values():
        print(f"dynexit: {reason}", file=sys.stderr)
    if found.unreadable:
        num_files = len(found.unreadable) + len(found.rows)
        raise Failure(f"left out: {len(found.unreadable)} of {counted(num_files, 'file')}")


def _write(found: "Predictions", view: "View", out: Path | None) -> None:
    """Writes the answers, to the terminal without `out`, and prints what they cost."""
    from dynexit.run_dir import atomic_write

    if out is None:
        found.write_csv(sys.stdout)
    else:
        with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            found.write_csv(file)
    seen = view.stats()
    macs = sum(row.macs for row in found.rows) / len(found.rows) / view.full_macs
    print(
        f"dynexit: {counted(seen.num_images, 'image')} by {view.name}, {macs:.4f} of the backbone's MACs; "
        f"{seen.num_near} with a confidence within {view.router.tolerance:.2g} of a threshold",
        file=sys.stderr,
    )


def _export(options: argparse.Namespace) -> None:
    import json

    from dynexit.export.folder import MOST_DIFFERENCE, SETTINGS, export_model

    count, check = export_model(
        options.directory, options.out, options.to, verify=options.verify, allow_code=options.allow_code
    )
    points = json.loads((options.out / SETTINGS).read_text(encoding="utf-8"))["points"]
    print(
        f"{options.out}: {counted(count, 'program')}, {counted(len(points), 'operating point')}, router.json and "
        "router.py"
    )
    if check is None:
        print("dynexit: nothing was checked; run again with --verify to compare answers", file=sys.stderr)
        return
    print(
        f"dynexit: checked on the probe, {counted(check.num_answers, 'answer')}: logits differ by at most "
        f"{check.difference:.2g} of the largest (allowed {MOST_DIFFERENCE:g}); {counted(check.num_near, 'answer')} had "
        f"a confidence within {check.tolerance:.2g} of a threshold, {check.num_other} of them left at another exit",
        file=sys.stderr,
    )
