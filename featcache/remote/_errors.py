"""What fsspec and the packages behind it raise, said the way featcache says it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import FeatcacheError, RemoteError
from ._urls import without_secrets

__all__ = ["is_beyond_the_end", "system_class", "translated"]

_EXTRA = {"s3": "'featcache[s3]'", "s3a": "'featcache[s3]'"}
_PACKAGES = {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
# By name, since the packages that define them need not be installed.
_NO_CREDENTIALS = frozenset(
    (
        "ClientAuthenticationError",
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    )
)
_REFUSED = frozenset(
    (
        "401",
        "403",
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "Unauthorized",
    )
)
_MAX_REASON = 200


def system_class(protocol: str, where: str) -> Any:
    """Return fsspec's class for a protocol.

    Raises
    ------
    RemoteError
        There is none of that name, or its package is not installed.
    """
    package = _EXTRA.get(protocol, _PACKAGES.get(protocol, ""))
    try:
        fsspec = importlib.import_module("fsspec")
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        missing = package or "the package that fsspec names for it"
        also = "" if protocol in _EXTRA or not _is_missing("fsspec") else "fsspec "
        raise RemoteError(
            f"{where}: cannot be opened: {_reason(error)}; run pip install {also}{missing}"
        ) from None
    except ValueError:
        raise RemoteError(
            f"{where}: expected a URL of a protocol that fsspec knows (s3, gs, az, https, sftp, …),"
            f" found {protocol!r}; correct it, or name a path"
        ) from None


@contextmanager
def translated(where: str, protocol: str, done: str) -> Iterator[None]:
    """Turn whatever a request ends in into one line.

    ``FileNotFoundError`` passes, so that callers can say what they had expected; a bucket
    that is not there does not.

    Parameters
    ----------
    where : str
        The URL, without its secrets.
    protocol : str
        Its protocol.
    done : str
        What was being done: ``"read"``, ``"listed"``, ``"written"``.

    Raises
    ------
    FileNotFoundError
        There is nothing of that name.
    RemoteError
        Everything else.
    """
    try:
        yield
    except FeatcacheError:
        raise
    except Exception as error:  # every package raises errors of its own
        causes = _causes(error)
        codes = {code for cause in causes for code in _codes(cause)}
        if "NoSuchBucket" in codes or "bucket does not exist" in str(error):
            advice = f"check its name{_endpoint(protocol)}"
            raise RemoteError(
                f"{where}: cannot be {done}: expected a bucket of that name, found none; {advice}"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(where) from None
        kinds = {type(cause).__name__ for cause in causes}
        if kinds & _NO_CREDENTIALS:
            raise RemoteError(
                f"{where}: cannot be {done}: expected credentials, found none that can be used "
                f"({_reason(error)}); {_how_to_log_in(protocol)}"
            ) from None
        if codes & _REFUSED or isinstance(error, PermissionError):
            raise RemoteError(
                f"{where}: cannot be {done}: expected the right to do so, found that the server "
                f"refuses it ({_reason(error)}); {_how_to_log_in(protocol)}"
            ) from None
        raise RemoteError(
            f"{where}: cannot be {done}: {_reason(error)}; check the URL and the network"
            f"{_endpoint(protocol)}, and run it again"
        ) from None


def is_beyond_the_end(error: BaseException) -> bool:
    """Tell whether a range was refused since the file, an empty one, has none of it."""
    codes = {code for cause in _causes(error) for code in _codes(cause)}
    return bool(codes & {"416", "InvalidRange"})


def _how_to_log_in(protocol: str) -> str:
    if protocol in _EXTRA:
        return (
            "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true "
            "for a public bucket), and AWS_ENDPOINT_URL for another store than Amazon's"
        )
    return (
        "log in the way its package wants it, or set its options as "
        f"FSSPEC_{protocol.upper()}_OPTION=value"
    )


def _endpoint(protocol: str) -> str:
    return ", or AWS_ENDPOINT_URL for another store than Amazon's" if protocol in _EXTRA else ""


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _codes(error: BaseException) -> list[str]:
    """Return what a server called it: botocore keeps it in a response, aiohttp in a status."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return [str(response.get("Error", {}).get("Code", ""))]
    return [str(getattr(error, "status", ""))]


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = without_secrets(lines[0]) if lines else ""
    name = type(error).__name__
    text = said if isinstance(error, (OSError, ImportError)) and said else f"{name}: {said}"
    return text[:_MAX_REASON].rstrip(" .:")


def _is_missing(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return True
    return False
