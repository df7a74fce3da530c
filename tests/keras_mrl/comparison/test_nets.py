"""Nets of a comparison: their names, and what an image costs."""

import numpy as np
import pytest

from keras_mrl.comparison.nets import Net, backbone, madds, nets_for


def test_nets_have_names_of_their_own() -> None:
    nets = nets_for((8, 16, 32), seeds=3, seeded=(8, 32), unseen=True)
    names = [net.name for net in nets]
    assert len(set(names)) == len(names) == 17
    assert names[:3] == ["mrl-0", "ff_32-0", "mrl_e-0"]
    assert names[7:9] == ["mrl_seen-0", "ff_32_seen-0"]
    # Last, so that comparisons begun before these were trained keep their order.
    assert names[-2:] == ["ff_8_seen-0", "ff_16_seen-0"]


def test_multiply_adds_are_those_of_every_kernel() -> None:
    # Convolutions of a net of 8 filters on 16 x 16: input channels x output channels x 9 x places.
    places = {8: 8 * 8, 4: 4 * 4, 2: 2 * 2}
    by_hand = 9 * 3 * 8 * places[8]
    by_hand += 9 * (8 * 16 + 2 * 16 * 16) * places[4]
    by_hand += 9 * (16 * 32 + 2 * 32 * 32) * places[2]
    by_hand += 9 * 32 * 64 * places[2] + 64 * 5
    assert madds(backbone((16, 16, 3), width=5, filters=8)) == by_hand


def test_the_boosted_loss_counts_the_first_dim_twice() -> None:
    boosted, plain = Net("mrl_boosted", (4, 12)).loss(), Net("mrl", (4, 12)).loss()
    truth, logits = np.array([0]), np.array([[[0.0, 3.0], [0.0, 1.0]]], np.float32)
    first, both = np.log1p(np.exp(3.0)), np.log1p(np.exp(3.0)) + np.log1p(np.exp(1.0))
    assert float(plain(truth, logits)) == pytest.approx(both, rel=1e-5)
    assert float(boosted(truth, logits)) == pytest.approx(both + first, rel=1e-5)
