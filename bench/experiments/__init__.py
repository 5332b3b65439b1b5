"""Small training runs on real data, and measurements behind choices and figures."""
