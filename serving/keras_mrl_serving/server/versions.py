"""Which of the versions that stand under a model's base path are to be served."""

from collections.abc import Mapping
from typing import Any


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
