"""One gallery for all exits: queries embedded at an early layer among those of the whole encoder.

`align_exits` learns one linear map per layer on `train`, whose texts are the gallery as well.
`EarlyRetrieval` learns on `val` when the neighbours of an early query are settled, and is judged on
`test`: as its rule says, and as a server answers `retrieve`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from exits_judge import padded_lengths
from exits_texts import Features, Ids, by_length, mean_of, named, padded

from keras_mrl import MatryoshkaEncoder, align_exits
from keras_mrl.models.costs import count_costs
from keras_mrl_export import export_saved_model
from keras_mrl_serving import Client, EarlyRetrieval, ExactIndex, FunnelSchedule, Neighbors
from keras_mrl_serving.server import DevServer

Labels = Mapping[str, npt.NDArray[np.int64]]
NEIGHBORS = 10
LAST = "last"


@dataclass(frozen=True)
class Gallery:
    """The texts of `train`, embedded by the whole encoder.

    Args:
        index: The embeddings.
        labels: The intent of each.
    """

    index: ExactIndex
    labels: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Any, labels: npt.NDArray[np.int64], fingerprint: str = "") -> Gallery:
        """Make it of embeddings."""
        schedule = FunnelSchedule(dims=(rows.shape[1],), shortlists=(), k=NEIGHBORS)
        return cls(ExactIndex.build(rows, schedule, encoder_fingerprint=fingerprint), labels)

    def right(self, found: Neighbors, labels: npt.NDArray[np.int64]) -> float:
        """Return the share of queries whose nearest text has their intent."""
        return float(np.mean(self.labels[found.ids[:, 0]] == labels))


def on_means(layers: Sequence[str], width: int) -> MatryoshkaEncoder:
    """Return an encoder over the means of layers, whose exits are linear maps that change nothing.

    So it is trained as the encoder of `served` is, without running the layers again.
    """
    means = {name: keras.Input((width,), name=mean_of(name)) for name in (*layers, LAST)}
    inputs = {own.name: own for own in means.values()}
    maps = {
        name: keras.layers.Dense(width, kernel_initializer="identity")(means[name])
        for name in layers
    }
    exits = [keras.Model(inputs, made, name=name) for name, made in maps.items()]
    whole = keras.Model(inputs, keras.layers.Identity()(means[LAST]))
    return MatryoshkaEncoder(whole, exits=exits)


def one_index(
    encoder: keras.Model,
    layers: Sequence[str],
    features: Mapping[str, Features],
    rows: Mapping[str, Ids],
    labels: Labels,
) -> dict[str, Any]:
    """Return what queries lose that stop early, by layer.

    Args:
        encoder: Texts to the mean over the tokens of the last layer.
        layers: Where queries may stop.
        features: The means of all layers, of `train`, `val` and `test`.
        rows: The same texts as tokens.
        labels: Their intents.
    """
    model = on_means(layers, encoder.output_shape[-1])
    gallery = Gallery.of(features["train"][LAST], labels["train"])
    raw = {name: gallery.index.search(features["test"][name]) for name in layers}
    explained = align_exits(model, named(features["train"]))
    made = {
        part: model.all_exits().predict(named(features[part]), batch_size=1024, verbose=0)
        for part in ("val", "test")
    }
    found = {
        part: {name: gallery.index.search(own) for name, own in by_exit.items()}
        for part, by_exit in made.items()
    }
    served = MatryoshkaEncoder(encoder, exits=tuple(layers), name="texts")
    for layer, own in zip(served.exit_layers, model.exit_layers, strict=True):
        layer.set_weights(own.layers[-1].get_weights())
    work = _shares_of_work(served, layers, padded_lengths(rows["test"]))
    facts, rules = {}, {}
    for name in layers:
        own_gallery = Gallery.of(features["train"][name], labels["train"])
        val, test = ({end: own[end] for end in (name, LAST)} for own in found.values())
        rules[name] = EarlyRetrieval.learn(
            name, val[name], val[LAST], labels["val"], groups=labels["train"]
        )
        alone = EarlyRetrieval.learn(name, val[name], val[LAST])
        facts[name] = {
            "as_it_is": gallery.right(raw[name], labels["test"]),
            "aligned": gallery.right(test[name], labels["test"]),
            "own_gallery": own_gallery.right(
                own_gallery.index.search(features["test"][name]), labels["test"]
            ),
            "explained": explained[name],
            "same_text": float(np.mean(test[name].ids[:, 0] == test[LAST].ids[:, 0])),
            "by_intents": _judged(rules[name], test, gallery, labels["test"], work[name]),
            "by_texts": _judged(alone, test, gallery, labels["test"], work[name]),
        }
    whole = gallery.right(found["test"][LAST], labels["test"])
    for name, by_server in _ask(served, rules, gallery, rows["test"], labels["test"]).items():
        facts[name]["served"] = by_server
    return {"whole": whole, "gallery_rows": len(labels["train"]), "exits": _rounded(facts)}


def _judged(
    rule: EarlyRetrieval,
    test: Mapping[str, Neighbors],
    gallery: Gallery,
    labels: npt.NDArray[np.int64],
    work: npt.NDArray[np.float64],
) -> dict[str, float]:
    """Return what a rule does: queries that are not settled are embedded by the whole encoder."""
    early, last = test[rule.exit], test[LAST]
    stops = rule.settled(early)
    nearest = np.where(stops, early.ids[:, 0], last.ids[:, 0])
    right = float(np.mean(gallery.labels[nearest] == labels))
    return {
        "threshold": rule.threshold,
        "stops": float(np.mean(stops)),
        "right": right,
        "points_lost": 100 * (gallery.right(last, labels) - right),
        "other_text": float(np.mean(nearest != last.ids[:, 0])),
        "relative_flops": float(np.mean(work + ~stops)),
    }


def _shares_of_work(
    model: MatryoshkaEncoder, layers: Sequence[str], lengths: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return what each exit costs of rows by their lengths, as a share of the whole encoder."""
    known = (4, 12, 28)  # attention grows with the square of the length, all else in proportion
    counts = []
    for length in known:
        shapes = [(1, length)] * len(model.tower.inputs)
        costs = count_costs(model, shapes)
        parts = [costs.backbone[name] + costs.branch[name] for name in (*layers, LAST)]
        counts.append([own.multiply_adds for own in parts])
    *early, whole = (np.polyval(own, lengths) for own in np.polyfit(known, counts, 2).T)
    return {name: own / whole for name, own in zip(layers, early, strict=True)}


def _ask(
    model: MatryoshkaEncoder,
    rules: Mapping[str, EarlyRetrieval],
    gallery: Gallery,
    rows: Ids,
    labels: npt.NDArray[np.int64],
) -> dict[str, dict[str, float]]:
    """Return what a server says when `retrieve` asks it by each rule."""
    signatures = ["embed", *(f"embed_{name}" for name in rules)]
    width = gallery.index.width
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        export_saved_model(model, folder, padded(rows[:8]), dims=(width,), signatures=signatures)
        with DevServer(folder) as target, Client(target) as client:
            blocks = np.concatenate(gallery.index.blocks, axis=1)
            served = Gallery.of(blocks, gallery.labels, client.describe().fingerprint)
            for name, rule in rules.items():
                right, early = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
                for chosen in by_length(rows, 64):
                    found = rule.retrieve(client, padded([rows[i] for i in chosen]), served.index)
                    nearest = served.labels[found.neighbors.ids[:, 0]]
                    right[chosen], early[chosen] = nearest == labels[chosen], found.exit == name
                facts[name] = {"stops": float(early.mean()), "right": float(right.mean())}
    return facts


def _rounded(facts: Any) -> Any:
    if isinstance(facts, Mapping):
        return {name: _rounded(own) for name, own in facts.items()}
    return round(facts, 5)


def index_table(facts: Mapping[str, Any]) -> list[str]:
    """Return the table of the page."""
    lines = [
        "| layer | as it is, % | aligned, % | own gallery, % | by intents: stop | points lost "
        "| work | by texts: stop | other text, % | work |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in facts["exits"].items():
        intents, texts = own["by_intents"], own["by_texts"]
        shares = [100 * own[key] for key in ("as_it_is", "aligned", "own_gallery")]
        cells = [
            f"`{name}`",
            *(f"{share:.1f}" for share in shares),
            f"{intents['stops']:.2f}",
            f"{intents['points_lost']:.1f}",
            f"{intents['relative_flops']:.2f}",
            f"{texts['stops']:.2f}",
            f"{100 * texts['other_text']:.1f}",
            f"{texts['relative_flops']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
