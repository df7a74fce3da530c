"""A recommender: users and items in two towers, trained on what was bought, asked over gRPC.

    pip install 'keras-mrl[tensorflow,export,server]'
    python examples/recommender.py --out recommender

What happens, and what to look at:

1. Purchases are drawn: users have tastes, items have styles, and a few items are far more popular
   than all others. The last purchase of every user is held out.
2. Two towers learn from the other purchases, at 4, 8, 16 and 32 dims at once. A batch holds popular
   items many times, so the loss is told the ids of the items; and it is told how often each was
   bought, so that it does not learn to avoid what is popular.
3. Recall is printed per dim: how often the held-out item is the nearest of its batch, without and
   with ids, and how often it is the nearest of all items. Only with ids the first tells the last.
4. Both towers are exported as one model and served. Every item is embedded by the server, an index
   of two stages is built, and users ask for ten items each.

The model is written to `--out`. Any file of your own takes the place of `purchases`: user and item
of each purchase as integers, and arrays of what is known of users and of items.
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


def main() -> None:
    """Train, measure, export, ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("recommender"), help="%(default)s")
    parser.add_argument("--users", type=int, default=4000, help="%(default)s")
    parser.add_argument("--items", type=int, default=200, help="%(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import keras

    from keras_mrl import CorpusRecall

    keras.utils.set_random_seed(arguments.seed)
    users, items, bought = purchases(arguments.users, arguments.items, arguments.seed)
    train_users, train_ids = np.repeat(np.arange(len(users)), bought.shape[1] - 1), bought[:, :-1]
    train_ids, held_out = train_ids.ravel(), bought[:, -1]
    counts = np.bincount(train_ids, minlength=arguments.items)
    print(
        f"{len(train_ids):,} purchases; the most popular item has {counts.max() / counts.sum():.0%}"
    )

    encoder = two_towers(users.shape[1], items)
    corpus = (items, np.arange(arguments.items))
    encoder.fit(
        x=(users[train_users], rows(items, train_ids)),
        y={"candidate_ids": train_ids, "candidate_sampling_probability": counts[train_ids]},
        batch_size=BATCH,
        epochs=arguments.epochs,
        callbacks=[CorpusRecall(corpus, (users[:500], held_out[:500]), k=1)],
        verbose=0,
    )
    print_recalls(encoder, users, items, held_out)
    serve(encoder, users, items, held_out, arguments.out)


def purchases(num_users: int, num_items: int, seed: int, each: int = 8) -> tuple[Any, Any, Any]:
    """Return users `(users, 12)`, items as inputs by name, and item ids `(users, each)`."""
    random = np.random.default_rng(seed)
    tastes, styles = random.normal(size=(num_users, 4)), random.normal(size=(num_items, 4))
    popularity = 1 / random.permutation(np.arange(1, num_items + 1))  # Zipf's law
    interest = 3 * tastes @ styles.T + np.log(popularity)
    chance = random.gumbel(size=(each, *interest.shape))  # draws from the softmax of the interest
    known_of_users = np.tanh(tastes @ random.normal(size=(4, 12)))
    items = {
        "id": np.arange(num_items, dtype="int32")[:, None],
        "style": np.tanh(styles @ random.normal(size=(4, 6))).astype("float32"),
    }
    return known_of_users.astype("float32"), items, (interest + chance).argmax(axis=2).T


def rows(items: dict[str, Any], ids: Any) -> dict[str, Any]:
    """Return the inputs of some items."""
    return {name: values[ids] for name, values in items.items()}


def two_towers(user_width: int, items: dict[str, Any]) -> Any:
    """Return an encoder of users and items, compiled."""
    import keras

    from keras_mrl import ContrastiveLoss, MatryoshkaEncoder

    user = keras.Input((user_width,), name="user")
    hidden = keras.layers.Dense(64, "relu")(user)
    user_tower = keras.Model(user, keras.layers.Dense(DIMS[-1])(hidden), name="users")

    item = {
        "id": keras.Input((1,), dtype="int32", name="id"),
        "style": keras.Input((items["style"].shape[1],), name="style"),
    }
    table = keras.layers.Flatten()(keras.layers.Embedding(len(items["id"]), 16)(item["id"]))
    hidden = keras.layers.Dense(64, "relu")(keras.layers.Concatenate()([table, item["style"]]))
    item_tower = keras.Model(item, keras.layers.Dense(DIMS[-1])(hidden), name="items")

    encoder = MatryoshkaEncoder(user_tower, item_tower, initial_temperature=0.1, name="shop")
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


def serve(encoder: Any, users: Any, items: dict[str, Any], held_out: Any, out: Path) -> None:
    """Export both towers, embed all items by the server, and recommend ten to every user."""
    from keras_mrl_export import export_saved_model
    from keras_mrl_serving import Client, ExactIndex, FunnelSchedule
    from keras_mrl_serving.server import DevServer

    some = rows(items, np.arange(8))
    version = export_saved_model(encoder, out, sample=users[:8], other_sample=some, dims=DIMS)
    with DevServer(out, model_name="shop") as target, Client(target, "shop") as client:
        gallery = client.embed(items, dim=DIMS[-1], other_tower=True)
        schedule = FunnelSchedule(dims=(DIMS[1], DIMS[-1]), shortlists=(50,), k=10)
        fingerprint = client.describe().fingerprint
        index = ExactIndex.build(gallery, schedule, encoder_fingerprint=fingerprint)
        recommended = client.retrieve(users, index).ids
    recall = (recommended == held_out[:, None]).any(axis=1).mean()
    print(
        f"\nServed from {version}: the held-out item is among the ten recommended to {recall:.1%}."
    )
    print(f"User 0 bought {held_out[0]} last, and is recommended {recommended[0].tolist()}.")


if __name__ == "__main__":
    main()
