"""From a cache to a trained, checked and saved linear head."""

from __future__ import annotations

from ._result import ProbeResult
from ._run import probe

__all__ = ["ProbeResult", "probe"]
