"""Audits of a data set by its features: near-duplicates, wrong labels, outliers."""
