#!/usr/bin/env bash
# Runs the conformance and flow tests against the real server, in docker.
#
#   serving/deploy/conformance.sh [IMAGE [PYTEST ARGUMENT ...]]
#
# Without docker the same tests run against the development server: that is what `make test` does.
set -euo pipefail
cd "$(dirname "$0")/../.."

image=${1:-tensorflow/serving:2.20.0}
shift || true
python=${PYTHON:-.venv/bin/python}
if ! command -v docker > /dev/null; then
  echo "conformance.sh: The real server runs in docker. Received: no docker on PATH. Install it, or run make test." >&2
  exit 2
fi

# The tests fill these folders, and give the server their paths: they are the same in the container.
root=$(mktemp -d)
chmod 755 "$root"
mkdir "$root/plain" "$root/batching"
containers=()
clean_up() {
  for container in "${containers[@]}"; do docker rm --force "$container" > /dev/null; done
  rm -rf "$root"
}
trap clean_up EXIT

start() { # folder, flags: a server of model "default" over it; its address is in $target
  local folder=$1
  shift
  local container
  container=$(docker run --detach --volume "$root:$root:ro" --publish 127.0.0.1::8500 \
    --entrypoint tensorflow_model_server "$image" --port=8500 --model_name=default \
    --model_base_path="$root/$folder" --file_system_poll_wait_seconds=1 "$@")
  containers+=("$container")
  target=$(docker port "$container" 8500/tcp | head -n 1)
}

start plain --max_num_load_retries=0
export KERAS_MRL_TFS_TARGET=$target KERAS_MRL_TFS_BASE_PATH=$root/plain

"$python" -c 'from tests.serving.server.test_conformance_batching import PARAMETERS; print(PARAMETERS)' \
  > "$root/batching.config"
start batching --enable_batching=true --batching_parameters_file="$root/batching.config"
export KERAS_MRL_TFS_BATCHING_TARGET=$target KERAS_MRL_TFS_BATCHING_BASE_PATH=$root/batching

"$python" -m pytest tests/serving/server/test_conformance*.py "$@"
