"""Problems: noisy quadratics, least squares, and curvature spectra."""
