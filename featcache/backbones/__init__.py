"""Backbones: pixels in, features out."""
