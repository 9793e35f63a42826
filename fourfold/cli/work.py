"""train, eval, data and convert: what takes its time and leaves something behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from fourfold.cli.options import MODEL_HELP, SOURCE_HELP, Command, add_cache_format, add_json, add_numbers, load
from fourfold.cli.show import print_json, print_table, say, size_text

RECALL = ("mqar", "needle", "ruler")  # suites that go on where they were interrupted, and draw a map


def add_commands(command: Command) -> None:
    train = command("train", _train, "train from a recipe; continues an interrupted run by itself")
    train.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to replace")
    train.add_argument(
        "--report",
        action="store_true",
        help="do not train: write report.html of the recipe's run so far (or of RECIPE.toml, if that is its directory)",
    )

    evaluate = command("eval", _eval, "measure a model with a suite")
    evaluate.add_argument("suite", metavar="SUITE", help="module of fourfold.eval: media, bpb, needle, ruler, mqar")
    evaluate.add_argument("--model", default="nano", metavar="MODEL", help=MODEL_HELP)
    add_numbers(evaluate)
    evaluate.add_argument(
        "--length", type=lengths, metavar="N[,N...]", help="tokens of a test item: 4096, or 4K,64K,1M"
    )
    evaluate.add_argument(
        "--depths", type=shares, metavar="D[,D...]", help="where the needle lies: 0,0.5,1 (default: drawn)"
    )
    evaluate.add_argument("--task", help="one task of the suite")
    evaluate.add_argument("--samples", type=int, help="items per task")
    evaluate.add_argument("--seed", type=int, help="seed of the items")
    add_cache_format(evaluate, "fp32")
    evaluate.add_argument(
        "--without-engram", action="store_true", default=None, help="recall of the same weights without Engram's tables"
    )
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write the scores to this file")

    data = command("data", _data, "build or list training data")
    actions = data.add_subparsers(dest="action", required=True, metavar="build|list")
    build = actions.add_parser("build", help="fetch, convert and check a data set")
    build.add_argument("name", metavar="NAME")
    build.add_argument("--out", type=Path, metavar="DIR", help="where to (default: the data folder)")
    add_json(actions.add_parser("list", help="the data sets that can be built"))

    convert = command("convert", _convert, "write a model in another format: ours, or one that other engines read")
    convert.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    convert.add_argument("destination", type=Path, metavar="DST", help="a directory that is not there yet, or empty")
    convert.add_argument(
        "--family",
        metavar="NAME",
        help="a model_type, native, or fourfold: ours for transformers (default: native; of ours the first to fit)",
    )
    convert.add_argument(
        "--dialect", choices=("released", "transformers"), default="released", help="default: %(default)s"
    )
    convert.add_argument("--storage", metavar="NUMBERS", help="bf16, fp32, fp8 or what else the family has")
    add_json(convert)


def _train(args: argparse.Namespace) -> None:
    if args.report and args.recipe.is_dir():
        from fourfold.train.report import write_report

        if args.overrides:
            raise ValueError(f"key=value: {args.overrides[0]!r} cannot change a run that was; give its recipe instead")
        print(write_report(args.recipe))
        return
    if not args.recipe.is_file():
        raise ValueError(f"RECIPE.toml: {args.recipe} is not a file")
    from fourfold.fields import parse_override

    for override in args.overrides:
        parse_override(override)  # a slip of the pen is told before torch is loaded
    if args.report:
        from fourfold.train.recipe import Recipe
        from fourfold.train.report import write_report

        print(write_report(Path(Recipe.load(args.recipe, args.overrides).out)))
        return
    from fourfold.train.loop import train

    train(args.recipe, args.overrides)


def lengths(text: str) -> int | list[int]:
    """One number of tokens or several; K and M are 1,024 and 1,048,576."""
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [int(part.upper().rstrip("KM")) * units.get(part[-1:].upper(), 1) for part in text.split(",")]
    return found[0] if len(found) == 1 else found


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _eval(args: argparse.Namespace) -> None:
    import importlib
    import pkgutil

    import fourfold.eval

    suites = sorted(module.name for module in pkgutil.iter_modules(fourfold.eval.__path__) if not module.ispkg)
    if args.suite not in suites:
        raise ValueError(f"SUITE: {args.suite!r} is unknown; choose one of {', '.join(suites)}")
    if isinstance(args.length, list) and args.suite not in RECALL:
        raise ValueError(f"--length: {args.suite} takes one, got {len(args.length)}")
    if args.cache_format and args.suite not in RECALL:
        raise ValueError(f"--cache-format: {args.suite} reads without a cache")
    if args.without_engram and args.suite not in RECALL:
        raise ValueError(f"--without-engram: is for {', '.join(RECALL)}, not {args.suite}")
    names = ("length", "depths", "task", "samples", "seed", "cache_format", "without_engram")
    given = {name: getattr(args, name) for name in names}
    settings = {name: value for name, value in given.items() if value is not None}
    if args.suite in RECALL and args.json:
        settings["partial"] = args.json.with_suffix(".partial.jsonl")
    suite = importlib.import_module(f"fourfold.eval.{args.suite}")
    with contextlib.closing(load(args)) as model:
        report = suite.run(model, settings)
    rows = [
        (task, str(score.get("n", "")), *(f"{value:.4g}" for key, value in score.items() if isinstance(value, float)))
        for task, score in report["scores"].items()
    ]
    metrics = [key for key, value in next(iter(report["scores"].values()), {}).items() if isinstance(value, float)]
    print_table(f"{args.suite}, {args.model}", ("task", "n", *metrics), rows)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        say(f"scores written to {args.json}")
        if args.suite in RECALL:
            from fourfold.eval.recall.heatmap import draw

            draw(report["cells"], args.json.with_suffix(".svg"))
            settings["partial"].unlink()


def _data(args: argparse.Namespace) -> int:
    from fourfold.data.build import RECIPES, build

    if args.action == "list":
        listed = {name: {shard: source.skill for shard, source in shards.items()} for name, shards in RECIPES.items()}
        if args.json:
            print_json(listed)
            return 0
        for name, shards in listed.items():
            print_table(name, ("part", "needed for"), list(shards.items()))
        return 0
    report = build(args.name, args.out)
    return 1 if report.missing else 0


def _convert(args: argparse.Namespace) -> None:
    from fourfold.weights.export import convert, require_empty

    if args.family == "fourfold":
        from fourfold.weights.hf import export_hf

        require_empty(args.destination)
        dtypes = {None: "float32", "fp32": "float32", "bf16": "bfloat16"}
        if args.storage not in dtypes:
            raise ValueError(f"--storage: is {args.storage!r}; choose bf16 or fp32 for family fourfold")
        path = export_hf(args.source, args.destination, dtypes[args.storage])
        said = {"path": str(path), "family": "fourfold", "dialect": "transformers", "storage": args.storage or "fp32"}
        print_json(said) if args.json else print(f"{path}: fourfold, for the Auto classes of transformers")
        return
    shown = sys.stderr.isatty()
    done = convert(args.source, args.destination, args.family, args.dialect, args.storage, progress=shown)
    if args.json:
        print_json({**vars(done), "path": str(done.path)})
        return
    dialect = "" if done.family == "native" else f" ({done.dialect})"
    numbers = f"{done.tensors:,} tensors, {size_text(done.bytes)} in {done.storage}"
    print(f"{done.path}: {done.family}{dialect}, {numbers}")
