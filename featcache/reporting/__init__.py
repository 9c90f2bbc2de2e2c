"""Figures of results, and one HTML page of them."""
