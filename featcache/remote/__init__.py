"""What lies behind a URL: object stores and web servers, by fsspec.

``s3://``, ``gs://``, ``https://`` and whatever else fsspec has a package for. Nothing is
imported before a URL is used, and paths never come here. Requests that fail in passing are
made again by the package of the protocol; what stays is a `featcache.errors.RemoteError`.
"""

from __future__ import annotations

from ._place import Found, RemotePlace
from ._urls import is_url, located, shown

__all__ = ["Found", "RemotePlace", "is_url", "located", "shown"]
