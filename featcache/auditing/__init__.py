"""The health of a data set, read off its features."""
