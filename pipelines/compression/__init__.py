"""Code maps as bits: integer probabilities from a prior, an entropy coder driven by them, and the file they go into."""
