"""What is a URL and what a path, and how a URL is shown without its secrets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ..errors import RemoteError
from ..files import user_path

if TYPE_CHECKING:
    from ._place import RemotePlace

__all__ = ["check_no_secret", "is_url", "located", "shown", "without_secrets"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters at least: C: is a drive
_CUT_SHORT = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")  # what pathlib makes of a URL
_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)(?:[^\s/'\"]*@)?([^\s/?#'\")]*)[^\s'\")]*")
_WEB = ("http", "https")


def is_url(text: object) -> bool:
    """Tell whether this is a URL, ``file://`` too, and no path."""
    return isinstance(text, str) and bool(_URL.match(text))


def located(text: str | Path) -> Path | RemotePlace:
    """Return a path, or the place behind a URL; ``file://`` is a path.

    Raises
    ------
    RemoteError
        A URL with a password in it, or one that pathlib has damaged.
    """
    if not is_url(text):
        path = user_path(text)
        if isinstance(text, Path) and _CUT_SHORT.match(str(text)) and not path.exists():
            raise RemoteError(
                f"{text}: expected a URL as text, found a pathlib.Path, which makes one slash of "
                "two; give it as a str"
            )
        return path
    assert isinstance(text, str)
    parts = urlsplit(text)
    if parts.scheme.lower() == "file":
        return Path(unquote(parts.path))
    check_no_secret(text)
    from ._place import RemotePlace

    return RemotePlace(text)


def check_no_secret(url: str) -> None:
    """Refuse a URL with a password: it would stay in histories, records and logs.

    Raises
    ------
    RemoteError
        Which does not repeat it.
    """
    who, at, _ = _host(url).rpartition("@")
    if at and ":" in who:
        protocol = url.partition("://")[0].lower()
        names = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            if protocol in ("s3", "s3a")
            else f"FSSPEC_{protocol.upper()}_USERNAME and FSSPEC_{protocol.upper()}_PASSWORD"
        )
        raise RemoteError(
            f"{shown(url)}: expected a URL without credentials, found a name and a password in "
            f"it, which would end up in histories and logs; set {names} instead"
        )


def shown(url: str | Path) -> str:
    """Return a URL as it may be told, kept and printed; a path as it is.

    Without a password before the host, and without the query of a web address, which is where
    signed ones have their signature.
    """
    if not isinstance(url, str) or not is_url(url):
        return str(url)
    protocol, _, rest = url.partition("://")
    host = _host(url)
    who, at, name = host.rpartition("@")
    if at and ":" in who:
        rest = name + rest[len(host) :]
    if protocol.lower() in _WEB:
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{protocol}://{rest}"


def without_secrets(text: str) -> str:
    """Return what somebody else's message says, of each URL in it no more than the host."""
    return _IN_TEXT.sub(r"\1\2", text)


def _host(url: str) -> str:
    return re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]
