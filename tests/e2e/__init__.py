"""End to end: the command as a process, with the peers that people put in front of it."""
