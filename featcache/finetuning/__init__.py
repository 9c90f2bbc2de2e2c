"""Training a network end to end, or from a cached cut."""
