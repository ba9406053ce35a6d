"""Training runs: recipes, the loop, run folders, results."""
