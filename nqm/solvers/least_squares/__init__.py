"""Least squares with one pass over Gaussian inputs: exact moments and Monte Carlo."""
