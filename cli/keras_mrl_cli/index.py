"""Build an index of embeddings, and look at one that is there.

An index is a folder. It answers by a funnel: a short prefix of every row finds a shortlist, and
wider prefixes narrow that down. `keras-mrl search` asks it.

  keras-mrl index build --embeddings E.npy --out birds.index
  keras-mrl index show birds.index
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import click

from .shared import (
    MISUSED,
    SERVER_FLAGS,
    Option,
    RefusalError,
    check_one_of,
    checked_by,
    command,
    count_option,
    dims,
    given_flags,
    group,
    json_option,
    server_options,
    share,
    target_option,
    under,
)
from .words import prompt_option

K, RECALL, SAMPLE, BATCH, SEED = 10, 0.95, 500, 1, 0
_TARGETS = ("target_recall", "target_precision", "target_map")


def shortlists(text: str) -> tuple[int, ...]:
    """Return the numbers of rows of a flag; `none` has none."""
    return () if text == "none" else dims(text)


@command(
    """Build an index of embeddings: the cheapest funnel that finds enough, by measurement.

The embeddings are the rows of an .npy file, such as `keras-mrl embed --out` writes; it is
memory-mapped and may be larger than the memory. Without --shortlists a funnel is planned: short
prefixes, kinds of first stage and lengths of shortlist are tried on a sample of queries, and the
fastest that reaches the target is built. Each trial goes to stderr; the front of the best trials
is printed, and kept with the index. The sample is of the gallery's own rows, which are left
out of the gallery while it plans; real queries are better: --queries.

A folder that holds an index is replaced with --force, and stays whole until the new one is.

  keras-mrl index build --embeddings E.npy --out a.index --queries Q.npy
  keras-mrl index build --embeddings E.npy --out a.index --target-recall 0.98
  keras-mrl index build --embeddings E.npy --out b.index --engine exact
  keras-mrl index build --adaptor adapted --queries Q.npy --out c.index
""",
    Option("--embeddings", metavar="E.npy", help="the gallery's rows"),
    Option(
        "--adaptor",
        metavar="DIR",
        help="folder of `keras-mrl adapt`, whose projected rows are the gallery; --queries are "
        "projected here, and so are those of `keras-mrl search --adaptor`",
    ),
    Option("--out", required=True, metavar="DIR", help="folder the index is built in"),
    Option(
        "--ids",
        metavar="IDS",
        help="an .npy with an integer >= 0 per row, or text with one string a line (its number)",
    ),
    Option(
        "--metric",
        type=click.Choice(["cosine", "dot", "l2"]),
        default="cosine",
        help="how embeddings are compared (cosine)",
    ),
    count_option("--k", "K", f"neighbours the funnel returns ({K})", usual=K),
    Option(
        "--engine",
        type=click.Choice(["faiss", "exact"]),
        default="faiss",
        help="exact needs no FAISS, plans nothing and compares with every row in NumPy (faiss)",
    ),
    Option("--force", is_flag=True, help="replace the index that is there"),
    json_option(),
    *under(
        "The funnel",
        Option(
            "--dims",
            type=dims,
            metavar="M,...",
            help="dims of its stages; without --shortlists those a plan may use (powers of two, or "
            "the model's)",
        ),
        Option(
            "--shortlists",
            type=shortlists,
            metavar="N,...",
            help="rows each stage hands to the next, none for one dim; nothing is planned then",
        ),
        Option(
            "--first-stage",
            metavar="FACTORY",
            help="FAISS index over the first dim, as faiss.index_factory knows it (HNSW32); a plan "
            "tries this kind alone",
        ),
        Option(
            "--settings",
            metavar="NAME=VALUE",
            help="how hard the first stage looks, as efSearch=64 or nprobe=8; a plan begins there "
            "and doubles it",
        ),
    ),
    *under(
        "How it is planned",
        Option(
            "--target-recall",
            type=share,
            metavar="SHARE",
            help=f"share of the exact neighbours at the last dim that must be found ({RECALL})",
        ),
        Option(
            "--target-precision",
            type=share,
            metavar="SHARE",
            help="share of the neighbours that must have the query's label",
        ),
        Option(
            "--target-map",
            type=share,
            metavar="SHARE",
            help="mean average precision at k by label, as the paper counts it",
        ),
        Option("--labels", metavar="L.npy", help="a label per gallery row"),
        Option("--queries", metavar="Q.npy", help="embeddings of queries to measure by"),
        Option("--query-labels", metavar="QL.npy", help="a label per row of --queries"),
        count_option(
            "--sample",
            "ROWS",
            f"rows of the gallery to measure by ({SAMPLE}, or a tenth)",
            remedy=f"Leave it out for {SAMPLE}.",
        ),
        count_option(
            "--seed",
            "N",
            f"seed of the sample ({SEED})",
            least=0,
            remedy=f"Leave it out for {SEED}.",
        ),
        Option(
            "--plan-seconds",
            type=float,
            callback=checked_by(
                lambda seconds: math.isfinite(seconds) and seconds >= 0,
                "be a number of seconds",
                "Give for example 60.",
            ),
            metavar="SECONDS",
            help="begin no other first stage after so many, once a funnel reaches the target (try "
            "all)",
        ),
        count_option(
            "--batch",
            "ROWS",
            f"how many queries come at once ({BATCH})",
            remedy=f"Leave it out for {BATCH}.",
        ),
    ),
    *under(
        "The encoder of the embeddings",
        Option(
            "--fingerprint",
            metavar="TEXT",
            help="fingerprint of the encoder; a client refuses queries of another (unknown)",
        ),
        target_option("a server of the encoder, whose manifest has its fingerprint and its dims"),
        prompt_option("with --target: the prompt that stood before each text of the gallery"),
        *server_options(),
    ),
)
def build(arguments: SimpleNamespace) -> int:
    """Build an index."""
    check_one_of(arguments, *_TARGETS)
    check_one_of(arguments, "fingerprint", "target", "adaptor")
    if (arguments.embeddings is None) == (arguments.adaptor is None):
        raise _misused(
            "A gallery is the rows of --embeddings, or those that `keras-mrl adapt` projected",
            "neither" if arguments.adaptor is None else "both",
            "Give --embeddings E.npy, or --adaptor DIR",
        )
    _check_funnel(arguments)
    is_planned = arguments.engine == "faiss" and arguments.shortlists is None
    _check_plan(arguments, is_planned)
    flags = given_flags(arguments, SERVER_FLAGS)
    if flags and arguments.target is None:
        raise _misused(
            "A server is asked where --target names it",
            f"{', '.join(flags)} without --target",
            "Give for example --target localhost:8500",
        )
    if arguments.prompt is not None and arguments.target is None:
        raise _misused(
            "A prompt is one of those of the model that --target names",
            f"--prompt {arguments.prompt} without --target",
            "Give for example --target localhost:8500",
        )
    if not given_flags(arguments, _TARGETS):
        arguments.target_recall = RECALL
    arguments.batch = arguments.batch or BATCH
    arguments.seed = arguments.seed or SEED
    from .gallery import build_index

    return build_index(arguments, is_planned, SAMPLE)


def _check_funnel(arguments: SimpleNamespace) -> None:
    if arguments.shortlists is not None and arguments.dims is None:
        raise _misused(
            "Shortlists lead from one dim to the next",
            "--shortlists without --dims",
            "Name both, for example --dims 16,512 --shortlists 200",
        )
    if arguments.settings is not None and arguments.first_stage is None:
        raise _misused(
            "Settings are those of a first stage",
            "--settings without --first-stage",
            "Name both, for example --first-stage HNSW32 --settings efSearch=64",
        )
    if arguments.engine == "exact" and arguments.first_stage is not None:
        raise _misused(
            "The exact engine compares with every row and has no first stage of FAISS",
            "--first-stage with --engine exact",
            "Leave out one of them",
        )


def _check_plan(arguments: SimpleNamespace, is_planned: bool) -> None:
    flags = given_flags(
        arguments,
        (
            *_TARGETS,
            *("labels", "queries", "query_labels", "sample", "seed", "plan_seconds", "batch"),
        ),
    )
    if flags and not is_planned:
        raise _misused(
            "Nothing is planned with --shortlists or --engine exact",
            ", ".join(flags),
            "Leave them out, or let the funnel be planned",
        )
    drawn = given_flags(arguments, ("sample", "seed"))
    if drawn and arguments.queries is not None:
        raise _misused(
            "A sample of the gallery is drawn only where there are no queries",
            f"{', '.join(drawn)} with --queries",
            "Leave out one or the other",
        )
    by_label = given_flags(arguments, ("target_precision", "target_map"))
    if (arguments.labels is None) == bool(by_label):
        raise _misused(
            "A target by label (--target-precision, --target-map) and --labels belong together",
            ", ".join((*by_label, *given_flags(arguments, ("labels",)))) + " alone",
            "Give both, or --target-recall, which needs no labels",
        )
    has_labels = arguments.query_labels is not None
    if has_labels != (arguments.queries is not None and arguments.labels is not None):
        raise _misused(
            "--query-labels belong to --queries whose target is by label",
            f"{'' if has_labels else 'no '}--query-labels with "
            f"{', '.join(given_flags(arguments, ('queries', 'labels'))) or 'neither'}",
            "Give --queries, --labels and --query-labels together",
        )


def _misused(rule: str, received: str, remedy: str) -> RefusalError:
    return RefusalError(f"{rule}. Received: {received}. {remedy}.", MISUSED)


@command(
    """Show what an index is, after a look at every byte.

Prints its engine, its rows, its funnel, its encoder, its size in memory and on disk, and the plan
it was chosen by. Every file is compared with the digest written beside it, and an index that is
not as it was written is refused. FAISS need not be installed.

  keras-mrl index show birds.index
""",
    click.Argument(["index"], metavar="DIR", help="folder of the index"),
    json_option(),
)
def show(arguments: SimpleNamespace) -> int:
    """Show an index."""
    from .gallery import show_index

    return show_index(arguments.index, arguments.json)


index = group(__doc__, build=build, show=show)
