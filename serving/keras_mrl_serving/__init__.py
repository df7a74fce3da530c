"""SERVE: what an application that asks a Matryoshka model needs, without TensorFlow or Keras.

A name is imported when it is first used, so that the NumPy part never waits for gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aio import AsyncClient as AsyncClient
    from .calls import Signature as Signature
    from .calls import VersionStatus as VersionStatus
    from .cascade.audits import Audits as Audits
    from .cascade.audits import HarmEstimate as HarmEstimate
    from .cascade.audits import estimate_harm as estimate_harm
    from .cascade.breakdown import Breakdown as Breakdown
    from .cascade.breakdown import Estimate as Estimate
    from .cascade.breakdown import Group as Group
    from .cascade.breakdown import break_down as break_down
    from .cascade.certify import certify_cascade as certify_cascade
    from .cascade.confidence import fit_temperatures as fit_temperatures
    from .cascade.monitor import Drift as Drift
    from .cascade.monitor import exit_drift as exit_drift
    from .cascade.monitor import oracle_report as oracle_report
    from .cascade.policy import CascadePolicy as CascadePolicy
    from .cascade.policy import CascadeReport as CascadeReport
    from .cascade.policy import Guarantee as Guarantee
    from .cascade.search import CascadeFront as CascadeFront
    from .cascade.search import search_cascades as search_cascades
    from .cascade.stages import Stage as Stage
    from .cascade.stages import stage_logits as stage_logits
    from .client import Client as Client
    from .contract import Manifest as Manifest
    from .early import EarlyNeighbors as EarlyNeighbors
    from .early import EarlyRetrieval as EarlyRetrieval
    from .embeddings import truncate as truncate
    from .errors import AccessDeniedError as AccessDeniedError
    from .errors import DamagedIndexError as DamagedIndexError
    from .errors import DeadlineError as DeadlineError
    from .errors import EncoderMismatchError as EncoderMismatchError
    from .errors import InvalidInputError as InvalidInputError
    from .errors import KerasMrlError as KerasMrlError
    from .errors import ManifestError as ManifestError
    from .errors import MessageTooLargeError as MessageTooLargeError
    from .errors import ModelChangedError as ModelChangedError
    from .errors import ModelNotFoundError as ModelNotFoundError
    from .errors import NoCascadeError as NoCascadeError
    from .errors import NoHeadError as NoHeadError
    from .errors import NoIndexError as NoIndexError
    from .errors import NoOtherTowerError as NoOtherTowerError
    from .errors import ServerError as ServerError
    from .errors import ServerUnavailableError as ServerUnavailableError
    from .errors import SignatureNotFoundError as SignatureNotFoundError
    from .errors import TargetNotReachedError as TargetNotReachedError
    from .errors import UnknownDimError as UnknownDimError
    from .errors import UnknownExitError as UnknownExitError
    from .errors import UnknownPromptError as UnknownPromptError
    from .errors import UnreadableImageError as UnreadableImageError
    from .errors import VersionChangedError as VersionChangedError
    from .errors import VersionNotFoundError as VersionNotFoundError
    from .funnel import FunnelSchedule as FunnelSchedule
    from .images import read_image as read_image
    from .images import served_image as served_image
    from .index import ExactIndex as ExactIndex
    from .index import FaissIndex as FaissIndex
    from .index import FirstStage as FirstStage
    from .index import Plan as Plan
    from .index import QdrantIndex as QdrantIndex
    from .index import open_index as open_index
    from .index import plan_funnel as plan_funnel
    from .observer import OpenTelemetryMetrics as OpenTelemetryMetrics
    from .options import Options as Options
    from .options import Tls as Tls
    from .projection import ProjectedIndex as ProjectedIndex
    from .projection import Projection as Projection
    from .results import Classification as Classification
    from .results import ClassifiedRow as ClassifiedRow
    from .results import Neighbors as Neighbors
    from .results import Partial as Partial
    from .version import __version__ as __version__

# The same names for the run time, by module. A test holds both lists equal.
_NAMES = {
    "aio": "AsyncClient",
    "calls": "Signature VersionStatus",
    "cascade.audits": "Audits HarmEstimate estimate_harm",
    "cascade.breakdown": "Breakdown Estimate Group break_down",
    "cascade.certify": "certify_cascade",
    "cascade.confidence": "fit_temperatures",
    "cascade.monitor": "Drift exit_drift oracle_report",
    "cascade.policy": "CascadePolicy CascadeReport Guarantee",
    "cascade.search": "CascadeFront search_cascades",
    "cascade.stages": "Stage stage_logits",
    "client": "Client",
    "contract": "Manifest",
    "early": "EarlyNeighbors EarlyRetrieval",
    "embeddings": "truncate",
    "errors": (
        "AccessDeniedError DamagedIndexError DeadlineError EncoderMismatchError "
        "InvalidInputError KerasMrlError ManifestError MessageTooLargeError "
        "ModelChangedError ModelNotFoundError NoCascadeError NoHeadError NoIndexError "
        "NoOtherTowerError ServerError ServerUnavailableError SignatureNotFoundError "
        "TargetNotReachedError UnknownDimError UnknownExitError UnknownPromptError "
        "UnreadableImageError VersionChangedError VersionNotFoundError"
    ),
    "funnel": "FunnelSchedule",
    "images": "read_image served_image",
    "index": "ExactIndex FaissIndex FirstStage Plan QdrantIndex open_index plan_funnel",
    "observer": "OpenTelemetryMetrics",
    "options": "Options Tls",
    "projection": "ProjectedIndex Projection",
    "results": "Classification ClassifiedRow Neighbors Partial",
    "version": "__version__",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
