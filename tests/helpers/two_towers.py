"""Users and items of twelve tastes, and an encoder of two towers that take other inputs."""

from typing import Any

import keras
import numpy as np

from keras_mrl import ContrastiveLoss, MatryoshkaEncoder

DIMS = (2, 4, 8)
WIDTH = 8
_RANDOM = np.random.default_rng(0)
_TASTES = _RANDOM.normal(size=(12, 3))


def _rows(count: int, width: int) -> tuple[Any, Any]:
    """Rows of one side, and their tastes."""
    tastes = np.arange(count) % 12
    rows = _TASTES[tastes] @ _RANDOM.normal(size=(3, width))
    return (rows + 0.1 * _RANDOM.normal(size=rows.shape)).astype("float32"), tastes


USERS, USER_TASTES = _rows(48, 6)
_ITEM_ROWS, ITEM_TASTES = _rows(72, 5)
ITEMS = {"size": _ITEM_ROWS[:, :4], "price": _ITEM_ROWS[:, 4:]}
PAIRS = (
    USERS,
    {name: rows[:48] for name, rows in ITEMS.items()},
)  # a user and an item of its taste


def user_tower() -> keras.Model:
    inputs = keras.Input((6,), name="user")
    return keras.Model(inputs, keras.layers.Dense(WIDTH, "tanh")(inputs), name="users")


def item_tower() -> keras.Model:
    inputs = {"size": keras.Input((4,), name="size"), "price": keras.Input((1,), name="price")}
    joined = keras.layers.Concatenate()([inputs["size"], inputs["price"]])
    return keras.Model(inputs, keras.layers.Dense(WIDTH, "tanh")(joined), name="items")


def two_towers(epochs: int = 20) -> MatryoshkaEncoder:
    keras.utils.set_random_seed(0)
    encoder = MatryoshkaEncoder(user_tower(), item_tower(), name="shop")
    encoder.compile(keras.optimizers.Adam(0.03), ContrastiveLoss(DIMS, temperature=0.2))
    encoder.fit(PAIRS, epochs=epochs, batch_size=12, shuffle=False, verbose=0)
    return encoder


def user_embeddings(encoder: MatryoshkaEncoder, users: Any = USERS) -> Any:
    """The features of users, by NumPy in float64 from the weights of their tower."""
    return np.tanh(_dense(encoder.tower, users))


def item_embeddings(encoder: MatryoshkaEncoder, items: Any = ITEMS) -> Any:
    """The features of items, likewise."""
    return np.tanh(_dense(encoder.other_tower, np.concatenate([items["size"], items["price"]], 1)))


def _dense(tower: keras.Model, rows: Any) -> Any:
    kernel, bias = (keras.ops.convert_to_numpy(weight) for weight in tower.weights)
    return rows.astype("float64") @ kernel.astype("float64") + bias


def similarities(users: Any, items: Any, dim: int) -> Any:
    """Cosines of prefixes, `(users, items)`, in float64."""
    users, items = (
        rows[:, :dim] / np.linalg.norm(rows[:, :dim], axis=1, keepdims=True)
        for rows in (users, items)
    )
    return users @ items.T
