"""How good samples look, in figures: features of images, distances between sets of them, a classifier's verdict."""
