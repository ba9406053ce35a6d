"""Problems: quadratics, least squares, curvature spectra."""
