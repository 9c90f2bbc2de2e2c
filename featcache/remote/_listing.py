"""Everything below a folder of a store, in as few requests as its pages allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["AWS", "below"]

AWS = ("s3", "s3a")


def below(system: Any, protocol: str, root: str) -> Iterator[tuple[str, int | None, bool]]:
    """Yield path, size and whether it is a folder of everything below a folder.

    fsspec returns a dict for each file, 1.7 kB of them together, so that a million would take
    2 GB. An S3 client is asked for one page of names after the other instead.

    Parameters
    ----------
    system : object
        Fsspec's, of the store.
    protocol : str
        Its protocol.
    root : str
        The folder, without a ``/`` at its end; of a file that is no folder, it alone is yielded.
    """
    if protocol not in AWS:
        for key, info in system.find(root, withdirs=True, detail=True).items():
            yield key, info.get("size"), info.get("type") == "directory" or key.endswith("/")
        return
    bucket, _, prefix = root.partition("/")
    asked = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    nothing = True
    while True:
        page = system.call_s3("list_objects_v2", **asked)
        for item in page.get("Contents", ()):
            nothing = False
            key = item["Key"]
            yield f"{bucket}/{key}", item["Size"], key.endswith("/")
        if not page.get("IsTruncated"):
            break
        asked["ContinuationToken"] = page["NextContinuationToken"]
    if nothing and prefix:
        info = system.info(root)
        if info["type"] != "directory":
            yield root, info["size"], False
