"""The noisy quadratic itself in PyTorch: sampled, and trained through `LatePhase`."""
