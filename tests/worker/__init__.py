"""Tests of trioserve/worker: a real worker, inside the test or as a process."""
