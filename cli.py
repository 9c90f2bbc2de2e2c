"""Launcher from a checkout: ``python cli.py extract …``."""

from featcache.cli import run

run()
