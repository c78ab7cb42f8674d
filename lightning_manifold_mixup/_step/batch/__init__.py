"""What is in a batch, and where."""
