"""Training of retaining heads (Locret, arXiv 2410.01805; APB, arXiv 2502.12085, appendix B.1)."""
