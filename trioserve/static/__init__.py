"""Files: which may be served, in which form, and how their bytes reach the peer without being copied."""
