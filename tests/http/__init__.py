"""HTTP/1: one conformance suite for both engines, the responses, and both on the wire."""
