"""The draw, the arithmetic, and the hook that does it at layer k."""
