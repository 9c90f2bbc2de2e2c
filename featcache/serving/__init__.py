"""A local server: a head answers over HTTP, and labels are corrected in a browser."""
