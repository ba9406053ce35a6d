"""Configurations, sweeps over them, and what runs them."""
