"""Programs for a machine with a GPU: check, tests, tuning."""
