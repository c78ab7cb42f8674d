"""What reproduces the paper: models, data, figures, Theorem 1 and recipes. The product never imports it."""
