"""Features that were made elsewhere: their files recognised, read, and made a cache."""
