"""Labels in superposition, and the user's code that is handed them."""
