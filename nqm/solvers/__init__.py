"""Solvers: exact moments (walked or jumped), steady states, Monte Carlo."""
