"""Exported models: `from deploy import Detector`, see docs/en/api.md.

What the commands below this folder import first must not take long, so that the class comes when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.detector import Detector as Detector
    from deploy.detector import UserError as UserError


def __getattr__(name: str) -> Any:
    if name not in ("Detector", "UserError"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deploy import detector

    return getattr(detector, name)
