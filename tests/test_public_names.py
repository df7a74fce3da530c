"""Every public name, frozen: adding or losing one is a decision, not an accident."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

PUBLIC = {
    "keras_mrl": {
        "AcrossDims",
        "AdaptiveDecoder",
        "ContrastiveLoss",
        "CorpusRecall",
        "LearnedPositions",
        "MatryoshkaAdaptor",
        "MatryoshkaClassifier",
        "MatryoshkaEmbeddingLoss",
        "MatryoshkaEncoder",
        "MatryoshkaHead",
        "MatryoshkaLoss",
        "MatryoshkaMetric",
        "NeighborMetrics",
        "NestedCrossentropy",
        "Perplexity",
        "SupervisedContrastiveLoss",
        "Teacher",
        "TextEncoder",
        "Truncate",
        "align_exits",
        "causal_transformer",
        "cut",
        "embedder",
        "first_boosted",
        "freeze_before",
        "funnel_top_k",
        "generate",
        "log_spaced_dims",
        "measure_costs",
        "most_likely",
        "nested_crossentropy",
        "next_token",
        "sampler",
        "segment",
        "split",
        "suggest_exits",
    },
    "keras_mrl.baselines": {
        "LowRankHead",
        "PrincipalComponents",
        "RandomProbe",
        "Slimmable",
        "Switchable",
        "first_coordinates",
        "fixed_features",
        "low_rank_head",
        "principal_components",
        "random_probe",
        "slimmable",
    },
    "keras_mrl.comparison": {"ComparisonError", "Plan", "compare"},
    "keras_mrl.evaluation": {
        "LinearProbe",
        "ProjectionReport",
        "Quality",
        "TokenScores",
        "evaluate_retrieval",
        "evaluate_similarity",
        "learn_decoding_policy",
        "linear_probe",
        "mean_average_precision_at_k",
        "plot_accuracy",
        "plot_by_cost",
        "plot_by_dim",
        "plot_cascade",
        "plot_retrieval",
        "precision_at_k",
        "score_multilabel",
        "score_projection",
        "score_regression",
        "score_tokens",
        "evaluate",
        "expected_calibration_error",
        "score_embeddings",
        "score_head",
        "score_retrieval",
        "score_similarity",
    },
    "keras_mrl_export": {
        "ExportError",
        "ImageDecoder",
        "export_index",
        "export_saved_model",
        "publish_policy",
    },
    "keras_mrl_serving.server": {"DevServer"},
    "keras_mrl_serving.testing": {"InMemoryServer"},
    "keras_mrl_serving": {
        "AccessDeniedError",
        "AsyncClient",
        "Audits",
        "Breakdown",
        "CascadeFront",
        "CascadePolicy",
        "CascadeReport",
        "Classification",
        "ClassifiedRow",
        "Client",
        "DamagedIndexError",
        "DeadlineError",
        "EncoderMismatchError",
        "Estimate",
        "ExactIndex",
        "FaissIndex",
        "FirstStage",
        "FunnelSchedule",
        "InvalidInputError",
        "KerasMrlError",
        "Manifest",
        "ManifestError",
        "MessageTooLargeError",
        "ModelNotFoundError",
        "Neighbors",
        "ModelChangedError",
        "NoCascadeError",
        "NoHeadError",
        "NoIndexError",
        "NoOtherTowerError",
        "OpenTelemetryMetrics",
        "Options",
        "Partial",
        "Plan",
        "ProjectedIndex",
        "Projection",
        "QdrantIndex",
        "ServerError",
        "ServerUnavailableError",
        "Signature",
        "SignatureNotFoundError",
        "Stage",
        "TargetNotReachedError",
        "Tls",
        "UnknownDimError",
        "UnknownExitError",
        "UnknownPromptError",
        "UnreadableImageError",
        "VersionChangedError",
        "VersionNotFoundError",
        "VersionStatus",
        "open_index",
        "plan_funnel",
        "Drift",
        "EarlyNeighbors",
        "EarlyRetrieval",
        "Group",
        "Guarantee",
        "HarmEstimate",
        "break_down",
        "certify_cascade",
        "estimate_harm",
        "exit_drift",
        "fit_temperatures",
        "oracle_report",
        "read_image",
        "search_cascades",
        "stage_logits",
        "served_image",
        "truncate",
    },
}


def public_names(module: ModuleType) -> set[str]:
    listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return {n for n in listed if not n.startswith("_") and not inspect.ismodule(getattr(module, n))}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module: str) -> None:
    assert public_names(importlib.import_module(module)) == PUBLIC[module]


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in PUBLIC.items() for name in sorted(names)],
)
def test_a_public_name_is_documented(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(value) or ""
    assert text.splitlines()[0].endswith(".")
    if not (inspect.isclass(value) and issubclass(value, BaseException)):
        undocumented = [a for a in inspect.signature(value).parameters if f"{a}:" not in text]
        assert undocumented == []


def test_the_reference_shows_each_public_name_once() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE)
    names = {name for own in PUBLIC.values() for name in own}
    errors = {name for name in names if name.endswith("Error")} - {"ComparisonError", "ExportError"}
    assert names - errors <= set(shown)  # the errors of the client stand in one module
    assert len(shown) == len({*shown}) + 1  # a Plan of a comparison, and one of a funnel


def test_every_module_has_one_version() -> None:
    import keras_mrl
    import keras_mrl_serving

    assert keras_mrl.__version__ == keras_mrl_serving.__version__
