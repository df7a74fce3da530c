"""Build an index of embeddings: the cheapest funnel that finds enough, by measurement.

The embeddings are the rows of an .npy file, such as `keras-mrl embed --out` writes; it is
memory-mapped and may be larger than the memory. Without --shortlists a funnel is planned: short
prefixes, kinds of first stage and lengths of shortlist are tried on a sample of queries, and the
fastest that reaches the target is built. What is tried goes to stderr; the front of what was
found is printed, and kept with the index. The sample is of the gallery's own rows, which are left
out of the gallery while it plans; real queries are better: --queries.

A folder that holds an index is replaced with --force, and stays whole until the new one is.

  keras-mrl index build --embeddings E.npy --out birds.index --queries Q.npy --target-recall 0.98
  keras-mrl index build --embeddings E.npy --out birds.index --dims 16,512 --shortlists 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import asking
from ..refuse import refuse, unknown_flags

K, RECALL, SAMPLE, BATCH, SEED = 10, 0.95, 500, 1, 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; what only a plan uses is None where it was not given."""
    parser.add_argument("--embeddings", required=True, metavar="E.npy", help="the gallery's rows")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder the index is built in")
    parser.add_argument("--ids", metavar="I.npy", help="an integer >= 0 per row (its number)")
    parser.add_argument(
        "--metric",
        choices=("cosine", "dot", "l2"),
        default="cosine",
        help="how embeddings are compared (cosine)",
    )
    parser.add_argument("--k", type=int, default=K, help=f"neighbours the funnel returns ({K})")
    parser.add_argument(
        "--engine",
        choices=("faiss", "exact"),
        default="faiss",
        help="exact needs no FAISS, plans nothing and compares with every row in NumPy (faiss)",
    )
    parser.add_argument("--force", action="store_true", help="replace the index that is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_funnel_arguments(parser.add_argument_group("the funnel"))
    _add_plan_arguments(parser.add_argument_group("how it is planned"))
    _add_encoder_arguments(parser.add_argument_group("the encoder of the embeddings"))


def _add_funnel_arguments(funnel: argparse._ArgumentGroup) -> None:
    funnel.add_argument(
        "--dims",
        type=_numbers,
        metavar="M,...",
        help="dims of its stages; without --shortlists those a plan may use (powers of two, or "
        "the model's)",
    )
    funnel.add_argument(
        "--shortlists",
        type=_shortlists,
        metavar="N,...",
        help="rows each stage hands to the next, none for a single dim; nothing is planned then",
    )
    funnel.add_argument(
        "--first-stage",
        metavar="FACTORY",
        help="FAISS index over the first dim, as faiss.index_factory knows it (HNSW32); a plan "
        "tries this kind alone",
    )
    funnel.add_argument(
        "--settings",
        metavar="NAME=VALUE",
        help="how hard the first stage looks, as efSearch=64 or nprobe=8; a plan begins there "
        "and doubles it",
    )


def _add_plan_arguments(plan: argparse._ArgumentGroup) -> None:
    target = plan.add_mutually_exclusive_group()
    target.add_argument(
        "--target-recall",
        type=_share,
        metavar="SHARE",
        help=f"of the exact neighbours at the last dim that are to be found ({RECALL})",
    )
    target.add_argument(
        "--target-precision",
        type=_share,
        metavar="SHARE",
        help="of the neighbours that are to have the query's label",
    )
    target.add_argument(
        "--target-map",
        type=_share,
        metavar="SHARE",
        help="mean average precision at k by label, as the paper counts it",
    )
    plan.add_argument("--labels", metavar="L.npy", help="a label per gallery row")
    plan.add_argument("--queries", metavar="Q.npy", help="embeddings of queries to measure by")
    plan.add_argument("--query-labels", metavar="QL.npy", help="a label per row of --queries")
    plan.add_argument(
        "--sample",
        type=int,
        metavar="ROWS",
        help=f"of the gallery to measure by ({SAMPLE}, or a tenth)",
    )
    plan.add_argument("--seed", type=int, help=f"of the sample ({SEED})")
    plan.add_argument("--batch", type=int, help=f"how many queries come at once ({BATCH})")


def _add_encoder_arguments(encoder: argparse._ArgumentGroup) -> None:
    which = encoder.add_mutually_exclusive_group()
    which.add_argument(
        "--fingerprint", help="of the encoder; a client then refuses queries of another (unknown)"
    )
    which.add_argument(
        "--target",
        metavar="HOST:PORT",
        help="a server of it, whose manifest tells its fingerprint and its dims",
    )
    asking.add_server_arguments(encoder)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Build an index."""
    if rest:
        return refuse(unknown_flags(rest), status=2)
    return asking.finished(lambda: _work(arguments))


def is_planned(arguments: argparse.Namespace) -> bool:
    """Whether the funnel is chosen by measurement."""
    return arguments.engine == "faiss" and arguments.shortlists is None


def _work(arguments: argparse.Namespace) -> int:
    asking.check_server_arguments(arguments)
    _check_numbers(arguments)
    _check_funnel(arguments)
    _check_plan(arguments)
    flags = asking.server_flags(arguments)
    if flags and arguments.target is None:
        _refuse(
            "A server is asked where --target names it",
            f"{', '.join(flags)} without --target",
            "Give for example --target localhost:8500",
        )
    from .making import build

    return build(arguments)


def _check_numbers(arguments: argparse.Namespace) -> None:
    for flag, least, usual in (("k", 1, K), ("sample", 1, SAMPLE), ("batch", 1, BATCH)):
        _check_least(flag, getattr(arguments, flag), least, usual)
    _check_least("seed", arguments.seed, 0, SEED)


def _check_least(flag: str, value: int | None, least: int, usual: int) -> None:
    if value is not None and value < least:
        _refuse(f"--{flag} must be at least {least}", str(value), f"Leave it out for {usual}")


def _check_funnel(arguments: argparse.Namespace) -> None:
    if arguments.shortlists is not None and arguments.dims is None:
        _refuse(
            "Shortlists lead from one dim to the next",
            "--shortlists without --dims",
            "Name both, for example --dims 16,512 --shortlists 200",
        )
    if arguments.settings is not None and arguments.first_stage is None:
        _refuse(
            "Settings are those of a first stage",
            "--settings without --first-stage",
            "Name both, for example --first-stage HNSW32 --settings efSearch=64",
        )
    if arguments.engine == "exact" and arguments.first_stage is not None:
        _refuse(
            "The exact engine compares with every row and has no first stage of FAISS",
            "--first-stage with --engine exact",
            "Leave out one of them",
        )


def _check_plan(arguments: argparse.Namespace) -> None:
    by_label = _given(arguments, ("target_precision", "target_map"))
    names = ("target_recall", "target_precision", "target_map", "labels", "queries", "query_labels")
    given = _given(arguments, (*names, "sample", "seed", "batch"))
    if given and not is_planned(arguments):
        _refuse(
            "Nothing is planned with --shortlists or --engine exact",
            ", ".join(given),
            "Leave them out, or let the funnel be planned",
        )
    drawn = _given(arguments, ("sample", "seed"))
    if drawn and arguments.queries is not None:
        _refuse(
            "A sample of the gallery is drawn only where there are no queries",
            f"{', '.join(drawn)} with --queries",
            "Leave out one or the other",
        )
    if (arguments.labels is None) == bool(by_label):
        _refuse(
            "A target by label (--target-precision, --target-map) and --labels belong together",
            ", ".join((*by_label, *_given(arguments, ("labels",)))) + " alone",
            "Give both, or --target-recall, which needs no labels",
        )
    has_labels = arguments.query_labels is not None
    if has_labels != (arguments.queries is not None and arguments.labels is not None):
        _refuse(
            "--query-labels belong to --queries whose target is by label",
            f"{'' if has_labels else 'no '}--query-labels with "
            f"{', '.join(_given(arguments, ('queries', 'labels'))) or 'neither'}",
            "Give --queries, --labels and --query-labels together",
        )


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> list[str]:
    flags = {name: "--" + name.replace("_", "-") for name in names}
    return [flag for name, flag in flags.items() if getattr(arguments, name) is not None]


def _refuse(rule: str, received: str, remedy: str) -> None:
    raise asking.RefusalError(f"{rule}. Received: {received}. {remedy}.", status=2)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"it must be whole numbers with commas. Received: {text!r}. Give for example 16,512."
        ) from None


def _shortlists(text: str) -> tuple[int, ...]:
    return () if text == "none" else _numbers(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(
            f"it must be a share in (0, 1]. Received: {text!r}. Give for example 0.95."
        )
    return share
