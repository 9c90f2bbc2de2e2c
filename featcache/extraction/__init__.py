"""Run a backbone once over a data set, into a cache."""
