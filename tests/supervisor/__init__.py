"""Tests of trioserve/supervisor: the parent's decisions as tables, and its life with real processes."""
