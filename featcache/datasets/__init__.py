"""Data sets: images, their ids and labels."""
