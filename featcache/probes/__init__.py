"""Linear heads on cached features."""
