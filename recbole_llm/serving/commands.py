"""The subcommands ``recommend``, ``score``, ``export``, ``merge`` and ``serve`` of the command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from recbole_llm.adapter.merge import METHODS
from recbole_llm.serving.export import export
from recbole_llm.serving.merge import PROMPTS, merge_runs
from recbole_llm.serving.recommend import recommend
from recbole_llm.serving.run import ServedRun
from recbole_llm.serving.score import score
from recbole_llm.utils.text_output import spreadsheet_text

logger = logging.getLogger(__name__)

FORMATS = ("table", "csv", "json")
TITLE_WIDTH = 40


def run_command(argv: Sequence[str]) -> int:
    """Run ``argv[0]``, one of :data:`COMMANDS`, with the arguments behind it; the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    return COMMANDS[argv[0]](argv[1:])


# ---------------------------------------------------------------------- arguments


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"recbole-llm {name}", description=description, allow_abbrev=False)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--data_path", help="the folder of the data, if it is not where it was at training")
    return parser


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interactions", metavar="FILE", help="later interactions to append, an atomic .inter file"
    )
    parser.add_argument(
        "--items", metavar="FILE", help="titles of new items among them, an atomic .item file"
    )


def _retriever_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retriever", metavar="RUN", help="another run, e.g. of HLLM, that retrieves instead of the lens"
    )


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--explain", action="store_true", help="add the prompt, the lens's score and the gate"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="json: one object per line (default: table)"
    )
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")


def _load(args: argparse.Namespace) -> ServedRun:
    changes = {"data_path": args.data_path} if args.data_path else {}
    return ServedRun.load(
        args.run,
        interactions=getattr(args, "interactions", None),
        items=getattr(args, "items", None),
        device=args.device,
        retriever=getattr(args, "retriever", None),
        prefix_memory=None if getattr(args, "prefix_memory", None) is None else args.prefix_memory << 20,
        **changes,
    )


def ids_of(values: Sequence[str]) -> list[str]:
    """Ids of the command line; ``@file`` stands for the lines of a file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    found: list[str] = []
    for value in values:
        if not value.startswith("@"):
            found.append(value)
            continue
        path = Path(value[1:])
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        found += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return found


# ---------------------------------------------------------------------- output


def _show(table: pd.DataFrame, args: argparse.Namespace) -> int:
    """Print or write a table; 1 where ids were unknown."""
    text = rendered(table, args.format)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
        print(f"{len(table)} lines: {args.output}")
    else:
        print(text)
    unknown = {name: table.attrs.get(f"unknown_{name}", []) for name in ("users", "items")}
    for name, tokens in unknown.items():
        if tokens:
            print(f"not in the data, left out: {name} {', '.join(tokens)}", file=sys.stderr)
    return int(any(unknown.values()))


def rendered(table: pd.DataFrame, form: str) -> str:
    """A table as text: ``table`` for reading, ``csv``, or ``json`` with one object per line."""
    if form == "csv":
        if "title" in table:
            table = table.assign(title=table["title"].map(spreadsheet_text))
        return table.to_csv(index=False).rstrip("\n")
    if form == "json":
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    shown = table.drop(columns=[name for name in ("prompt",) if name in table])
    if "title" in shown:
        shown = shown.assign(
            title=shown["title"].map(lambda t: t if len(t) <= TITLE_WIDTH else t[: TITLE_WIDTH - 1] + "…")
        )
    lines = [
        shown.to_string(index=False, float_format="{:.4f}".format) if len(shown) else "nothing to recommend"
    ]
    if "prompt" in table:
        for row in table[table["prompt"].notna()].to_dict("records"):
            lines.append(f"\n--- prompt of user {row['user']}, item {row['item']} ---\n{row['prompt']}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- commands


def _recommend(argv: Sequence[str]) -> int:
    parser = _parser("recommend", "The items that a finished run ranks first for some users.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("users", nargs="+", help="ids of users as in the data's files; @FILE: one per line")
    parser.add_argument("--top", type=int, default=10, help="items per user (default: 10)")
    parser.add_argument(
        "--exclude_seen",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out items that the user has in the data (default: yes)",
    )
    parser.add_argument(
        "--candidates", nargs="+", metavar="ITEM", help="ids of the items to rank; @FILE: one per line"
    )
    parser.add_argument(
        "--retrieve",
        type=int,
        metavar="N",
        help="the lens, or the retriever, passes its first N items on to the LLM; 0: the LLM scores all (default: 50)",
    )
    _retriever_argument(parser)
    _data_arguments(parser)
    _output_arguments(parser)
    args = parser.parse_args(argv)
    table = recommend(
        _load(args),
        ids_of(args.users),
        args.top,
        args.exclude_seen,
        None if args.candidates is None else ids_of(args.candidates),
        retrieve=args.retrieve,
        explained=args.explain,
    )
    return _show(table, args)


def _score(argv: Sequence[str]) -> int:
    parser = _parser(
        "score", "The score of pairs: a probability, a log-likelihood, or the model's own score."
    )
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("pairs", help="csv file with the columns user_id and item_id")
    _data_arguments(parser)
    _output_arguments(parser)
    args = parser.parse_args(argv)
    if not Path(args.pairs).is_file():
        raise FileNotFoundError(f"there is no file {args.pairs}")
    pairs = pd.read_csv(args.pairs, dtype=str, keep_default_na=False, sep=None, engine="python")
    return _show(score(_load(args), pairs, explained=args.explain), args)


def _export(argv: Sequence[str]) -> int:
    parser = _parser("export", "Adapters of a run as PEFT folders, which PEFT, vLLM and SGLang load.")
    parser.add_argument("run", help="folder of the run")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument(
        "--users", nargs="+", metavar="USER", help="ids; @FILE: one per line; all: every user"
    )
    chosen.add_argument("--clusters", type=int, metavar="N", help="k-means of the users' gates")
    chosen.add_argument("--mean", action="store_true", help="the mean gate of all users")
    parser.add_argument("--output", metavar="FOLDER", help="new folder (default: export in the run's folder)")
    parser.add_argument("--item", help="for gates that see the target item: the item of the pairs")
    parser.add_argument("--rank", type=int, help="to write (default: the smallest that vLLM accepts)")
    parser.add_argument(
        "--evaluate", action="store_true", help="what clusters or the mean cost in AUC on test samples"
    )
    parser.add_argument(
        "--interactions", metavar="FILE", help="later interactions to append, an atomic .inter file"
    )
    args = parser.parse_args(argv)
    done = export(
        _load(args),
        args.output or Path(args.run) / "export",
        users=None if args.users is None else ids_of(args.users),
        clusters=args.clusters,
        mean=args.mean,
        item=args.item,
        rank=args.rank,
        evaluate=args.evaluate,
    )
    for name, path in done.folders.items():
        print(f"{name}: {path}")
    if done.index:
        print(f"index: {done.index}")
    print(f"base model {done.base}, rank {done.rank}")
    for line in [*done.lines, *done.start_lines()]:
        print(line)
    if done.unknown:
        print(f"not in the data, left out: users {', '.join(done.unknown)}", file=sys.stderr)
    return int(bool(done.unknown))


def _merge(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="recbole-llm merge",
        description="Merge plain LoRAs of one base model into one, without training.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", help="folders of runs, or of exported adapters")
    parser.add_argument("--method", choices=METHODS, default="cat", help="(default: cat)")
    parser.add_argument("--output", metavar="FOLDER", default="merged", help="new folder (default: merged)")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per run (default: equal)")
    parser.add_argument("--rank", type=int, help="truncate to this rank by SVD")
    parser.add_argument(
        "--density", type=float, default=0.5, help="share that ties and dare keep (default: 0.5)"
    )
    parser.add_argument(
        "--alpha", type=float, default=1e-6, help="ridge of regmean and iteris (default: 1e-6)"
    )
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help=f"of each run, for regmean and iteris ({PROMPTS})"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of iteris, at most (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops (default: 0)")
    parser.add_argument("--evaluate", action="store_true", help="AUC on every run's test samples")
    args = parser.parse_args(argv)
    options = {name: value for name, value in vars(args).items() if name not in ("runs", "output")}
    done = merge_runs(args.runs, args.output, **options)
    print(f"merged: {done.folder} (method {args.method}, rank {done.lora.rank})")
    for line in done.lines:
        print(line)
    for name, found in done.auc.items():
        print(f"AUC on {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    return 0


def _serve(argv: Sequence[str]) -> int:
    parser = _parser("serve", "Answer scores and recommendations over HTTP; needs the extra [serve].")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: a free one)")
    parser.add_argument(
        "--token",
        help="what clients send as 'Authorization: Bearer TOKEN' (default: RECBOLE_LLM_TOKEN, or a new one)",
    )
    parser.add_argument("--no_token", action="store_true", help="answer everyone")
    parser.add_argument("--max_body", type=int, default=1 << 20, help="bytes of a request (default: 1 MiB)")
    parser.add_argument("--max_pairs", type=int, default=1000, help="pairs of a request (default: 1000)")
    parser.add_argument(
        "--max_candidates", type=int, default=1000, help="candidates of a request (default: 1000)"
    )
    parser.add_argument(
        "--max_users_kept", type=int, default=10_000, help="recommendations kept (default: 10000)"
    )
    parser.add_argument(
        "--prefix_memory",
        type=int,
        metavar="MIB",
        help="for keys and values of users' prompts; 0: keep none (default: 1024 where they can be shared exactly)",
    )
    _retriever_argument(parser)
    parser.add_argument("--batch", type=int, default=256, help="pairs scored in one call (default: 256)")
    _data_arguments(parser)
    args = parser.parse_args(argv)
    try:
        from recbole_llm.serving import server  # the one module that needs the extra
    except ImportError as error:
        raise ValueError(str(error)) from error
    listening, token = server.listen(args.host, args.port), None
    if not args.no_token:
        token = args.token or os.environ.get("RECBOLE_LLM_TOKEN")
        if not token:
            token = server.new_token()
            print(f"token: {token}", flush=True)
    limits = server.Limits(
        body=args.max_body,
        pairs=args.max_pairs,
        candidates=args.max_candidates,
        users_kept=args.max_users_kept,
        batch=args.batch,
    )
    server.serve(_load(args), listening, token=token, limits=limits)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "recommend": _recommend,
    "score": _score,
    "export": _export,
    "merge": _merge,
    "serve": _serve,
}
"""What the command line hands over to, by its first argument."""
