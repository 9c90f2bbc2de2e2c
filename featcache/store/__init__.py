"""The cache: one HDF5 file, written whole, verified when read."""
