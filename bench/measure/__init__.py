"""How things are measured and kept: timing, the check before it, results, the environment."""
