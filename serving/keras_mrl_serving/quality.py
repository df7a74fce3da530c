"""Which dim is good enough: the measures that an evaluation wrote into a manifest."""

from __future__ import annotations

from .contract import Manifest

# Of a measure whose name has one of these words less is better: a share of it is no quality.
_LESS_IS_BETTER = {
    *("ece", "error", "loss", "crossentropy", "nll", "brier", "perplexity"),
    *("mae", "mse", "rmse", "mape", "msle"),
}
# What a dim is chosen by where nothing is named: of classes, of several labels a row, of values.
_USUAL = ("top1", "ap_macro", "r2")


def cheapest_dim(manifest: Manifest, quality: float = 0.98, measure: str | None = None) -> int:
    """Return the smallest dim that keeps a share of the full dim's quality.

    Args:
        manifest: Manifest of a model exported with `quality`.
        quality: The share, in (0, 1].
        measure: One of the manifest's measures, of which more is better. None takes the only such
            measure, or else `top1`, `ap_macro` or `r2`, whichever there is.

    Raises:
        ValueError: If the manifest holds no quality or not this measure, less of it is better, the
            share is not in (0, 1], or the full dim's value is not above 0.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f",
        ...     dims=(8, 16, 64), width=64, inputs={"image": image}, made_with={},
        ...     quality={"8": {"top1": 0.6}, "16": {"top1": 0.79}, "64": {"top1": 0.8}})
        >>> cheapest_dim(manifest, 0.98)
        16
    """
    if not 0 < quality <= 1:
        raise ValueError(
            f"quality must be a share in (0, 1]. Received: quality={quality!r}. "
            "Give for example 0.98: two hundredths of the full dim's quality may go."
        )
    by_dim = {dim: (manifest.quality or {}).get(str(dim), {}) for dim in manifest.dims}
    full = by_dim[manifest.width]
    if not full:
        raise ValueError(
            "A dim is chosen by the quality in the manifest. "
            f"Received: model {manifest.name!r}, exported without it. Export it again with "
            "export_saved_model(..., quality={dim: {'top1': ...}}), or name a dim."
        )
    measures = [name for name in full if not _LESS_IS_BETTER & {*name.lower().split("_")}]
    if not measures:
        raise ValueError(
            "A dim is chosen by a measure of which more is better. "
            f"Received: {', '.join(full)} of model {manifest.name!r}. "
            "Export it with another as quality, such as top1 or r2, or name a dim."
        )
    usual = [name for name in _USUAL if name in measures]
    default = measures[0] if len(measures) == 1 else next(iter(usual), None)
    chosen = default if measure is None else measure
    if chosen not in measures:
        names = ", ".join(measures)
        raise ValueError(
            f"measure must be one of {names}. Received: measure={measure!r}. Choose one of them."
        )
    if full[chosen] <= 0:
        raise ValueError(
            "A share of the full dim's quality is taken of a quality above 0. "
            f"Received: {chosen} {full[chosen]:g} at dim {manifest.width} of {manifest.name!r}. "
            "Choose another measure, or name a dim."
        )
    least = quality * full[chosen]
    return next(d for d in manifest.dims if by_dim[d].get(chosen, float("-inf")) >= least)
