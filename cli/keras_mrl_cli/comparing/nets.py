"""Which nets a comparison trains, and how each is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, first_boosted
from keras_mrl.baselines import slimmable

from .network import backbone


@dataclass(frozen=True)
class Net:
    """One net to train.

    Args:
        method: `mrl`, `mrl_e`, `mrl_boosted` (the first dim's loss counts twice), `ff` or
            `slimmable`.
        dims: Of its head.
        seed: Of its weights and its batches.
        all_classes: False leaves the unseen classes out.
    """

    method: str
    dims: tuple[int, ...]
    seed: int = 0
    all_classes: bool = True

    @property
    def name(self) -> str:
        """As its folder is called."""
        dim = f"_{self.dims[-1]}" if self.method == "ff" else ""
        seen = "" if self.all_classes else "_seen"
        return f"{self.method}{dim}{seen}-{self.seed}"

    @property
    def is_searched(self) -> bool:
        """Whether neighbours are looked for among its features."""
        return self.seed == 0 and self.method in ("mrl", "mrl_e", "ff")

    def make(self, shape: tuple[int, ...], num_classes: int, filters: int) -> keras.Model:
        """Return the net, newly initialised."""
        keras.utils.set_random_seed(self.seed)
        body = backbone(shape, self.dims[-1], filters)
        if self.method == "slimmable":
            return slimmable(body, num_classes, self.dims)
        head = MatryoshkaHead(num_classes, dims=self.dims, tied=self.method == "mrl_e")
        return MatryoshkaClassifier(body, head)

    def loss(self) -> MatryoshkaLoss:
        """Return what it is trained on."""
        inner = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return MatryoshkaLoss(inner, first_boosted if self.method == "mrl_boosted" else None)


def nets_for(
    dims: Sequence[int], seeds: int, seeded: Sequence[int], unseen: bool
) -> tuple[Net, ...]:
    """Return the nets of a comparison, those one would miss most first.

    Args:
        dims: Of the nested heads.
        seeds: How many times the Matryoshka net and some fixed-feature nets are trained.
        seeded: The dims of those fixed-feature nets.
        unseen: Whether the Matryoshka net and a fixed-feature net per dim are also trained without
            the unseen classes.
    """
    ladder, width = tuple(dims), dims[-1]
    first = [Net("mrl", ladder), Net("ff", (width,)), Net("mrl_e", ladder)]
    first += [Net("ff", (dim,)) for dim in ladder[:-1]]
    first += [Net("slimmable", ladder), Net("mrl_boosted", ladder)]
    if unseen:
        first += [Net("mrl", ladder, all_classes=False), Net("ff", (width,), all_classes=False)]
    for seed in range(1, seeds):
        first += [Net("mrl", ladder, seed), *(Net("ff", (dim,), seed) for dim in seeded)]
    if unseen:
        first += [Net("ff", (dim,), all_classes=False) for dim in ladder[:-1]]
    return tuple(first)
