"""Wire protocols: an engine turns bytes into requests and does no I/O; the loop above it does all the waiting."""
