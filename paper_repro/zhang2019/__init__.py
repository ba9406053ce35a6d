"""The eight figures of Zhang et al. 2019 (NeurIPS, arXiv 1907.04164), computed exactly.

"Which algorithmic choices matter at which batch sizes? Insights from a noisy quadratic model":
h_i = 1/i over 10^4 directions, C = H, start N(0, I), target loss 0.01. Re-implemented from the
paper's description on the unbinned spectrum with first-crossing steps; docs/zhang2019.md says where
that differs from the published notebook, and by how much.
"""
