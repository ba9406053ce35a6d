"""Loss, gradient, curvature and gradient noise of a trained network. Useful without the bridge."""
