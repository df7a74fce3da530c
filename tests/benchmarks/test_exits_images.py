"""The page of the benchmark on images: its numbers follow from its counts, its net is the original.

`KERAS_MRL_LITE0` names the PyTorch state dict of EfficientNet-Lite0; without it the net has random
weights, and fewer pixels.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from keras_mrl_serving import CascadePolicy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/benchmarks/exits_images.md"
FACTS: dict[str, Any] = json.loads(PAGE.with_suffix(".json").read_text())


@pytest.fixture
def lite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("efficientnet_lite")


@pytest.mark.parametrize("part", ["holdout", "test"])
def test_the_numbers_of_a_cascade_follow_from_its_counts(part: str) -> None:
    facts = FACTS[part]
    rows = facts["rows"]
    for cascade in facts["cascades"].values():
        assert sum(cascade["stage_rows"]) == rows
        assert cascade["right"] == facts["full_right"] - cascade["harmed"] + cascade["gained"]
        assert cascade["accuracy"] == round(cascade["right"] / rows, 4)
        assert cascade["harm"] == round(cascade["harmed"] / rows, 4)
        work = np.dot(cascade["stage_costs"], cascade["stage_rows"]) / rows
        assert cascade["relative_flops"] == pytest.approx(work, abs=1e-4)
    last = facts["fixed_exits"]["last@256"]
    assert last == {"accuracy": round(facts["full_right"] / rows, 4), "relative_flops": 1.0}


def test_the_promise_follows_from_the_rows_that_tested_it() -> None:
    promise = CascadePolicy.from_json(FACTS["policies"]["harm"]).guarantee
    assert promise is not None
    assert (promise.kind, promise.risk, promise.delta) == ("harm", 0.01, 0.05)
    assert promise.size == FACTS["holdout"]["rows"] // 2
    assert binom.cdf(promise.errors, promise.size, promise.risk) <= promise.delta


def test_the_page_says_what_was_counted() -> None:
    page, facts = PAGE.read_text(), FACTS["test"]
    names = {
        "harm": "**harm at most 1%, certified**",
        "accuracy_drop": "loss of at most one point, certified",
        "within_half_a_point": "half a point on the holdout",
    }
    for name, text in names.items():
        own = facts["cascades"][name]
        cells = (
            text,
            f"{own['accuracy']:.2%}",
            f"{own['harm']:.2%}",
            f"{own['relative_flops']:.3f}",
        )
        assert f"| {' | '.join(cells)} |" in page
    for share in FACTS["cpu_share_batch8"].values():
        assert f"**{share:.2f}**" in page
    for name, own in facts["fixed_exits"].items():
        exit_, _, dim = name.partition("@")
        if dim == "256":
            row = f"| {exit_} | {own['accuracy']:.2%} | {own['relative_flops']:.3f} |"
            assert row in page


def test_the_multiply_adds_are_those_of_the_layers(lite: Any) -> None:
    size, filters = 128 // 2, 32
    total = 3 * 9 * filters * size**2
    for repeats, kernel, stride, expansion, outputs in lite.STAGES:
        for repeat in range(repeats):
            wide = expansion * filters
            total += filters * wide * size**2 if expansion > 1 else 0
            size //= 1 if repeat else stride
            total += wide * (kernel**2 + outputs) * size**2
            filters = outputs
    total += filters * 1280 * size**2
    assert FACTS["multiply_adds"] == total + 1280 * 256 + 256 * 100


@pytest.mark.backend
def test_the_net_carried_over_is_the_original(lite: Any) -> None:
    path = os.environ.get("KERAS_MRL_LITE0")
    state = random_state(lite.STAGES) if path is None else lite.read_state(Path(path))
    size = 32 if path is None else 128
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype("float32")
    net = lite.efficientnet_lite0(size)
    lite.carry(net, state)
    expected = original(state, lite.STAGES, images)
    assert expected.std() > 0.01
    np.testing.assert_allclose(net.predict(images, verbose=0), expected, atol=1e-4)


def random_state(stages: Any) -> dict[str, Any]:
    """Weights of the names and shapes that `efficientnet_lite_pytorch` gives them."""
    generator = np.random.default_rng(0)
    state: dict[str, Any] = {}

    def add(convolution: str, normalization: str, *shape: int) -> None:
        spread = np.sqrt(2 / np.prod(shape[1:]))
        state[f"{convolution}.weight"] = generator.normal(0, spread, shape).astype("float32")
        for part, low, high in (
            *(("weight", 0.5, 1.5), ("bias", -0.5, 0.5)),
            *(("running_mean", -0.5, 0.5), ("running_var", 0.5, 1.5)),
        ):
            values = generator.uniform(low, high, shape[0])
            state[f"{normalization}.{part}"] = values.astype("float32")

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    filters, block = 32, 0
    for repeats, kernel, _, expansion, outputs in stages:
        for _ in range(repeats):
            own, wide = f"_blocks.{block}", expansion * filters
            if expansion > 1:
                add(f"{own}._expand_conv", f"{own}._bn0", wide, filters, 1, 1)
            add(f"{own}._depthwise_conv", f"{own}._bn1", wide, 1, kernel, kernel)
            add(f"{own}._project_conv", f"{own}._bn2", outputs, wide, 1, 1)
            filters, block = outputs, block + 1
    add("_conv_head", "_bn1", 1280, filters, 1, 1)
    return state


def original(state: dict[str, Any], stages: Any, images: Any) -> Any:
    """What PyTorch makes of images: convolutions padded as in TensorFlow, then normalized."""
    import torch
    from torch.nn import functional

    def layer(x: Any, convolution: str, normalization: str, stride: int = 1) -> Any:
        kernel = torch.tensor(state[f"{convolution}.weight"])
        width = kernel.shape[-1]
        missing = max(width - stride, 0) if x.shape[-1] % stride == 0 else width - 1
        x = functional.pad(x, [missing // 2, missing - missing // 2] * 2)
        x = functional.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])
        mean, variance, weight, bias = (
            torch.tensor(state[f"{normalization}.{part}"])
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, weight, bias, eps=1e-3)

    with torch.no_grad():
        x = torch.tensor((images - 127) / 128).permute(0, 3, 1, 2)
        x = functional.relu6(layer(x, "_conv_stem", "_bn0", 2))
        block = 0
        for repeats, _, stride, expansion, _ in stages:
            for repeat in range(repeats):
                own, before = f"_blocks.{block}", x
                if expansion > 1:
                    x = functional.relu6(layer(x, f"{own}._expand_conv", f"{own}._bn0"))
                step = 1 if repeat else stride
                x = functional.relu6(layer(x, f"{own}._depthwise_conv", f"{own}._bn1", step))
                x = layer(x, f"{own}._project_conv", f"{own}._bn2")
                x, block = x + before if repeat else x, block + 1
        x = functional.relu6(layer(x, "_conv_head", "_bn1"))
        return x.permute(0, 2, 3, 1).numpy()
