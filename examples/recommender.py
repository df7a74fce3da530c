"""A recommender: users and items in two towers, trained on what was bought, asked over gRPC.

    pip install 'keras-mrl[tensorflow,export,server]'
    python examples/recommender.py --out recommender
    python examples/recommender.py --data purchases.csv

What happens, and what to look at:

1. `--data` is a file with a line `user,item` for each purchase, in the order of time; any words or
   numbers name them. Without it purchases are drawn: users have tastes, items have styles, and a
   few items are far more popular than all others. The last purchase of every user is held out.
2. Two towers learn from the other purchases, at 4, 8, 16 and 32 dims at once. A batch holds popular
   items many times, so the loss is told the ids of the items; and it is told how often each was
   bought, so that it does not learn to avoid what is popular.
3. Recall is printed per dim: how often the held-out item is the nearest of its batch, without and
   with ids, and how often it is the nearest of all items. Only with ids the first tells the last.
4. Both towers are exported as one model and served. Every item is embedded by the server, an index
   of two stages is built, and users ask for ten items each. The most popular ten are the rival.

The model is written to `--out`. What is known of users or items beside their ids goes into a tower
as one more array by name, as the drawn ones have.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

DIMS = (4, 8, 16, 32)
BATCH = 256
MOST = 50  # items that the first stage of a search hands on


def main() -> None:
    """Train, measure, export, ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="lines user,item (drawn)")
    parser.add_argument("--out", type=Path, default=Path("recommender"), help="%(default)s")
    parser.add_argument("--users", type=int, default=4000, help="%(default)s")
    parser.add_argument("--items", type=int, default=200, help="%(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import keras

    from keras_mrl import CorpusRecall

    keras.utils.set_random_seed(arguments.seed)
    if arguments.data is None:
        users, items, bought = drawn(arguments.users, arguments.items, arguments.seed)
    else:
        users, items, bought = read(parser, arguments.data)
    train_users = np.concatenate([[user] * (len(own) - 1) for user, own in enumerate(bought)])
    train_ids = np.concatenate([own[:-1] for own in bought])
    held_out = np.array([own[-1] for own in bought])
    counts = np.bincount(train_ids, minlength=len(items["id"]))
    print(
        f"{len(train_ids):,} purchases; the most popular item has {counts.max() / counts.sum():.0%}"
    )

    encoder = two_towers(users, items)
    corpus = (items, np.arange(len(items["id"])))
    encoder.fit(
        x=(rows(users, train_users), rows(items, train_ids)),
        y={"candidate_ids": train_ids, "candidate_sampling_probability": counts[train_ids]},
        batch_size=BATCH,
        epochs=arguments.epochs,
        callbacks=[CorpusRecall(corpus, (rows(users, slice(500)), held_out[:500]), k=1)],
        verbose=0,
    )
    print_recalls(encoder, users, items, held_out)
    popular = np.argsort(-counts, kind="stable")[:10]
    serve(encoder, users, items, held_out, popular, arguments.out)


def drawn(num_users: int, num_items: int, seed: int, each: int = 8) -> tuple[Any, Any, Any]:
    """Return users and items as inputs by name, and the items that each user bought."""
    random = np.random.default_rng(seed)
    tastes, styles = random.normal(size=(num_users, 4)), random.normal(size=(num_items, 4))
    popularity = 1 / random.permutation(np.arange(1, num_items + 1))  # Zipf's law
    interest = 3 * tastes @ styles.T + np.log(popularity)
    chance = random.gumbel(size=(each, *interest.shape))  # draws from the softmax of the interest
    users = {"taste": np.tanh(tastes @ random.normal(size=(4, 12))).astype("float32")}
    items = {
        "id": np.arange(num_items, dtype="int32")[:, None],
        "style": np.tanh(styles @ random.normal(size=(4, 6))).astype("float32"),
    }
    return users, items, (interest + chance).argmax(axis=2).T


def read(parser: argparse.ArgumentParser, file: Path) -> tuple[Any, Any, list[list[int]]]:
    """Return the same of a file; users who bought one thing only have nothing to learn from."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        parser.error(f"--data must be a file of text in UTF-8. Received: {error}.")
    numbers: dict[str, int] = {}
    bought: dict[str, list[int]] = {}
    for line in lines:
        user, comma, item = line.partition(",")
        if comma:
            bought.setdefault(user, []).append(numbers.setdefault(item, len(numbers)))
    baskets = [own for own in bought.values() if len(own) > 1]
    if len(baskets) < BATCH or len(numbers) < MOST:
        parser.error(
            f"--data must have {BATCH} users who bought two things or more, and {MOST} items. "
            f"Received: {len(baskets)} and {len(numbers)} in {len(lines)} lines user,item."
        )
    users, items = (
        {"id": np.arange(count, dtype="int32")[:, None]} for count in (len(baskets), len(numbers))
    )
    return users, items, baskets


def rows(inputs: dict[str, Any], ids: Any) -> dict[str, Any]:
    """Return the inputs of some users or items."""
    return {name: values[ids] for name, values in inputs.items()}


def tower(name: str, inputs: dict[str, Any]) -> Any:
    """Return a model of what is known of a user or an item: a learnt vector of ids, and arrays."""
    import keras

    given, known = {}, []
    for key, values in inputs.items():
        given[key] = keras.Input(values.shape[1:], dtype=values.dtype.name, name=key)
        if key == "id":
            vectors = keras.layers.Embedding(len(values), 16)(given[key])
            known.append(keras.layers.Flatten()(vectors))
        else:
            known.append(given[key])
    joined = keras.layers.Concatenate()(known) if len(known) > 1 else known[0]
    hidden = keras.layers.Dense(64, "relu")(joined)
    return keras.Model(given, keras.layers.Dense(DIMS[-1])(hidden), name=name)


def two_towers(users: dict[str, Any], items: dict[str, Any]) -> Any:
    """Return an encoder of users and items, compiled."""
    import keras

    from keras_mrl import ContrastiveLoss, MatryoshkaEncoder

    towers = tower("users", users), tower("items", items)
    encoder = MatryoshkaEncoder(*towers, initial_temperature=0.1, name="shop")
    encoder.compile(keras.optimizers.Adam(0.003), ContrastiveLoss(DIMS))
    return encoder


def print_recalls(encoder: Any, users: Any, items: dict[str, Any], held_out: Any) -> None:
    """Print the recall of every dim in batches and over all items."""
    from keras_mrl.evaluation import evaluate

    pairs = (users, rows(items, held_out))
    blind = encoder.evaluate(pairs, batch_size=BATCH, verbose=0, return_dict=True)
    known = encoder.evaluate(pairs, held_out, batch_size=BATCH, verbose=0, return_dict=True)
    gallery = (items, np.arange(len(items["id"])))
    quality = evaluate(encoder, users, held_out, gallery, dims=DIMS, verbose=0)
    print("\nThe held-out item is the nearest")
    print("  dims  of the batch, ids unknown  of the batch, ids known  of all items")
    for dim in DIMS:
        of_batches = (scores[f"recall_{dim}"] for scores in (blind, known))
        columns = zip((25, 23, 12), (*of_batches, quality[dim]["nn1"]), strict=True)
        print(f"  {dim:4d}", *(f"{share:{width}.3f}" for width, share in columns), sep="  ")


def serve(
    encoder: Any, users: Any, items: dict[str, Any], held_out: Any, popular: Any, out: Path
) -> None:
    """Export both towers, embed all items by the server, and recommend ten to every user."""
    from keras_mrl_export import export_saved_model
    from keras_mrl_serving import Client, ExactIndex, FunnelSchedule
    from keras_mrl_serving.server import DevServer

    some = rows(items, np.arange(8))
    version = export_saved_model(
        encoder, out, sample=rows(users, slice(8)), other_sample=some, dims=DIMS
    )
    with DevServer(out, model_name="shop") as target, Client(target, "shop") as client:
        gallery = client.embed(items, dim=DIMS[-1], other_tower=True)
        shortlist = min(MOST, len(gallery))
        schedule = FunnelSchedule(dims=(DIMS[1], DIMS[-1]), shortlists=(shortlist,), k=10)
        fingerprint = client.describe().fingerprint
        index = ExactIndex.build(gallery, schedule, encoder_fingerprint=fingerprint)
        recommended = client.retrieve(users, index).ids
    print(f"\nServed from {version}:")
    print(f"  user 0 bought {held_out[0]} last, and is recommended {recommended[0].tolist()}")
    recall = (recommended == held_out[:, None]).any(axis=1).mean()
    rival = np.isin(held_out, popular).mean()
    print(
        f"gained: the ten recommended hold the last purchase of {recall:.1%} of the users, the ten "
        f"most popular that of {rival:.1%}."
    )


if __name__ == "__main__":
    main()
