"""Small training runs on real data."""
