"""Choosing a dim by what the evaluation found at each, as the manifest carries it."""

from __future__ import annotations

from .contract import Manifest

_FALLING = ("ece", "perplexity", "loss")  # less is better: a share of them keeps nothing


def cheapest_dim(manifest: Manifest, quality: float = 0.98, measure: str | None = None) -> int:
    """Return the smallest dim that keeps a share of the full dim's quality.

    Args:
        manifest: That of a model exported with `quality`.
        quality: The share, in (0, 1].
        measure: Which of the measures in the manifest, one of which more is better. None takes the
            only one, or else `top1`.

    Raises:
        ValueError: If the manifest holds no quality, not this measure, or the share is none.

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
    rising = [name for name in full if name not in _FALLING]
    names = ", ".join(rising)
    default = rising[0] if len(rising) == 1 else "top1"
    chosen = default if measure is None else measure
    if chosen not in rising:
        raise ValueError(
            f"measure must be one of {names}. Received: measure={measure!r}. Choose one of them."
        )
    least = quality * full[chosen]
    return next(d for d in manifest.dims if by_dim[d].get(chosen, float("-inf")) >= least)
