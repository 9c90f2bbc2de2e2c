"""The version of this package: hatchling reads it, caches and records keep it."""

__version__ = "0.1.0"
