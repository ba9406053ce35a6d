"""Our study of expected loss against ensemble size and learning rate, one module per figure."""
