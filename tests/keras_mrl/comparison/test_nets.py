"""Nets of a comparison: their names, and what an image costs."""

import numpy as np
import pytest

from keras_mrl.comparison.nets import Net, backbone, madds, nets_for, start_scaled
from keras_mrl.comparison.training import compile_net


def test_nets_have_names_of_their_own() -> None:
    nets = nets_for((8, 16, 32), seeds=3, seeded=(8, 32), unseen=True)
    names = [net.name for net in nets]
    assert len(set(names)) == len(names) == 20
    assert names[:3] == ["mrl-0", "ff_32-0", "mrl_e-0"]
    assert names[5:8] == ["mrl_half-0", "ff_8_half-0", "ff_32_half-0"]
    assert names[10:12] == ["mrl_seen-0", "ff_32_seen-0"]
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


def test_without_variants_the_verdict_has_all_its_nets() -> None:
    names = [net.name for net in nets_for((8, 16), 1, (8, 16), False, variants=False)]
    assert names == [
        "mrl-0", "ff_16-0", "mrl_e-0", "ff_8-0", "mrl_half-0", "ff_8_half-0", "ff_16_half-0",
    ]  # fmt: skip


@pytest.mark.backend
@pytest.mark.parametrize(("method", "scale"), [("mrl", 1e-3), ("ff", 1e3), ("slimmable", 1e3)])
def test_nets_on_embeddings_learn_them_at_any_scale(method: str, scale: float) -> None:
    net = Net(method, (8,) if method == "ff" else (4, 8))
    model = net.make((6,), 3, filters=0)
    rows = np.random.default_rng(0).normal(size=(96, 6)).astype(np.float32)
    labels = np.arange(96) % 3
    rows[np.arange(96), labels] += 4
    start_scaled(model, scale * rows)
    compile_net(model, net, epochs=20, rows=96, rate=2e-2)
    model.fit(scale * rows, labels, batch_size=32, epochs=20, verbose=0)
    answers = model.predict(scale * rows, verbose=0).argmax(-1)
    assert answers.shape == (96, len(net.dims))
    assert (answers[:, -1] == labels).mean() > 0.85
