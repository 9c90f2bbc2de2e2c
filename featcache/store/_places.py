"""Where caches are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import user_path

__all__ = ["default_folder"]


def default_folder() -> Path:
    """Return where caches and runs land: ``$FEATCACHE_DIR``, else ``cache`` here."""
    return user_path(os.environ.get("FEATCACHE_DIR") or "cache")
