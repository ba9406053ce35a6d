"""Trained models as folders that can be served: weights, preprocessing, metrics, a model card."""
