"""Static files: paths, confinement, preconditions, ranges, cold pages, listings, siblings; all of it on the wire."""
