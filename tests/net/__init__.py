"""Tests of trioserve/net: real sockets, no server."""
