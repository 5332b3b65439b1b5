"""How ops are defined, and which backend serves a call."""
