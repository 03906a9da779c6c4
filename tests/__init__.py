"""Tests mirror the packages; `apps.py` has tiny misbehaving apps; `e2e/` real processes and peers."""
