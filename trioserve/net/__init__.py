"""Bytes: sockets that are bound, waited for, read and written. Nothing here knows HTTP."""
