"""Which versions of a model stand under its base path, and which of them are to be served."""

import os
import re
from collections.abc import Mapping
from typing import Any

# absl::SimpleAtoi: ASCII white space around, a sign, ASCII digits. So "00000123" is version 123.
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)[ \t\n\v\f\r]*", re.ASCII)


def version_number(name: str) -> int | None:
    """The version a folder name stands for, or None for a name that is no 64-bit number.

    Args:
        name: name of a child of the base path.
    """
    match = _NUMBER.fullmatch(name)
    if match is None:
        return None
    number = int(match[1])
    return number if -(2**63) <= number < 2**63 else None


def list_versions(base_path: str) -> dict[int, str]:
    """The path of every version under `base_path`, ascending.

    Of two names with one number the later in sort order counts. A file with a numeric name counts
    too: TensorFlow Serving does not look at what it is before it loads it.

    Args:
        base_path: the folder of the model.

    Raises:
        OSError: `base_path` is no folder that can be read.
    """
    found = {}
    for name in sorted(os.listdir(base_path)):
        number = version_number(name)
        if number is not None:
            found[number] = os.path.join(base_path, name)
    return dict(sorted(found.items()))


def aspired_versions(found: Mapping[int, str], policy: Any) -> dict[int, str]:
    """The versions a policy asks for, among those that were found.

    Args:
        found: paths by version.
        policy: a `ServableVersionPolicy`; an empty one asks for the highest version.
    """
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return dict(found)
    if choice == "specific":
        return {number: found[number] for number in policy.specific.versions if number in found}
    count = max(policy.latest.num_versions, 1)
    return {number: found[number] for number in sorted(found)[-count:]}


def absent_versions(found: Mapping[int, str], policy: Any) -> list[int]:
    """The versions a policy asks for by number that were not found, ascending.

    Args:
        found: paths by version.
        policy: a `ServableVersionPolicy`.
    """
    return sorted(set(policy.specific.versions) - found.keys())
