"""The cascade that a file holds."""

from __future__ import annotations

import json
from pathlib import Path

from keras_mrl_serving import CascadePolicy, ManifestError

from . import RefusalError


def read_policy(file: str) -> CascadePolicy:
    """Return the policy of `--policy`.

    Raises:
        RefusalError: If the file does not read, or holds none.
    """
    try:
        return CascadePolicy.from_json(json.loads(Path(file).read_bytes()))
    except OSError as error:
        raise RefusalError(
            "--policy must be a file that can be read. "
            f"Received: {file} ({error.strerror}). Correct the path."
        ) from error
    except ManifestError as error:
        raise RefusalError(f"{file}: {error}") from error
    except ValueError as error:
        raise RefusalError(
            "--policy must be the JSON of a CascadePolicy. "
            f"Received: {file} ({error}). Write it with json.dump(policy.to_json(), file)."
        ) from error
