"""The flags of `tensorflow_model_server`: those the development server has, and the others."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _truth(text: str) -> bool:
    """Read a boolean as TensorFlow's flags do."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false. Received: {text}")
    return text == "true"


# By name: how a value is read, and what the help says; in brackets what holds without the flag.
FLAGS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "model_base_path": (
        str,
        "folder that holds the model's versions, each in a folder named by its number",
    ),
    "model_name": (str, "name clients ask for (default)"),
    "port": (int, "gRPC port; 0 lets the system choose (8500)"),
    "file_system_poll_wait_seconds": (
        int,
        "seconds between looks for new versions; 0 means only at start, below 0 never (1)",
    ),
    "model_config_file": (
        str,
        "text proto of ModelServerConfig: many models, version policies, labels; takes the place "
        "of --model_base_path and --model_name (none)",
    ),
    "model_config_file_poll_wait_seconds": (
        int,
        "seconds between reloads of that file; 0 means never (0)",
    ),
    "rest_api_port": (int, "HTTP port of the REST API; 0 lets the system choose (no REST)"),
    "rest_api_timeout_in_ms": (int, "how long a REST call may compute, in milliseconds (30000)"),
    "grpc_socket_path": (str, "Unix domain socket to listen on as well (none)"),
    "grpc_channel_arguments": (
        str,
        "options of the gRPC server, as in grpc.max_connection_age_ms=60000,key=value (none)",
    ),
    "ssl_config_file": (
        str,
        "text proto of SSLConfig; with it the gRPC port speaks TLS (no TLS)",
    ),
    "enable_batching": (_truth, "compute requests in batches (false)"),
    "batching_parameters_file": (str, "text proto of BatchingParameters (its defaults)"),
    "enable_model_warmup": (_truth, "replay warm-up records before a version serves (true)"),
    "enable_grpc_healthcheck_service": (_truth, "serve grpc.health.v1 (false)"),
    "enable_serialization_as_tensor_content": (
        _truth,
        "answer in bytes instead of one field per dtype (false)",
    ),
    "allow_version_labels_for_unavailable_models": (
        _truth,
        "let new labels stand for versions that are not available, as none is at start (false)",
    ),
    "max_num_load_retries": (int, "how often a version that does not load is tried again (5)"),
    "load_retry_interval_micros": (int, "microseconds between two tries (60000000)"),
}
# What the real server has besides, up to 2.20.
_LACKING = frozenset(
    """
    enable_per_model_batching_parameters enable_profiler enable_signature_method_name_check
    flush_filesystem_caches grpc_max_threads mixed_precision monitoring_config_file num_load_threads
    num_request_iterations_for_warmup num_tflite_interpreters_per_pool num_tflite_pools
    num_unload_threads per_process_gpu_memory_fraction platform_config_file prefer_tflite_model
    remove_unused_fields_from_bundle_metagraph rest_api_enable_cors_support rest_api_num_threads
    saved_model_tags skip_initialize_tpu tensorflow_inter_op_parallelism
    tensorflow_intra_op_parallelism tensorflow_session_config_file tensorflow_session_parallelism
    thread_pool_factory_config_file use_alts_credentials version xla_cpu_compilation_enabled
    xla_gpu_compilation_enabled
    """.split()
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; one that is not given leaves nothing in the namespace."""
    for name, (read, text) in FLAGS.items():
        if read is _truth:
            parser.add_argument(
                f"--{name}",
                type=read,
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                metavar="true|false",
                help=text,
            )
        else:
            parser.add_argument(f"--{name}", type=read, default=argparse.SUPPRESS, help=text)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags that were given."""
    return {name: value for name, value in vars(arguments).items() if name in FLAGS}


def as_text(values: Mapping[str, Any]) -> list[str]:
    """Return flags as TensorFlow's own parser reads them."""
    ordered = {name: values[name] for name in FLAGS if name in values}
    return [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in ordered.items()
    ]


def lacking(rest: Sequence[str]) -> list[str]:
    """Return those of the arguments that are flags of the real server alone."""
    return [word for word in rest if word.removeprefix("--").partition("=")[0] in _LACKING]
