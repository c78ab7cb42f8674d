"""The self-check: ghosts, oracles, and what follows from their answers."""
