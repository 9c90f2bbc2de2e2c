"""Options given by name, as a dataclass, wrongly."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest

from featcache.options import with_options


@dataclass(frozen=True)
class Options:
    size: int = 32
    cut: str = "avgpool"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size: expected at least 1, found {self.size}")


@with_options(Options)
def verb(subject, *, options, on_note=print):
    return subject, options


def test_both_forms_are_the_same():
    assert verb("a", size=64) == ("a", Options(64)) == verb("a", options=Options(64))
    assert verb("a") == ("a", Options())


def test_what_is_no_option_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'siez'"):
        verb("a", siez=3)
    with pytest.raises(TypeError, match="expected options or size, found both"):
        verb("a", options=Options(), size=3)
    with pytest.raises(ValueError, match="size: expected at least 1, found 0"):
        verb("a", size=0)


def test_the_signature_shows_every_option():
    shown = inspect.signature(verb).parameters
    assert list(shown) == ["subject", "size", "cut", "on_note"]
    assert shown["size"].default == 32
