"""Tests of trioserve/structure: time, the drain, the boundary, admission; each with a real worker."""
