"""vqgen: images to discrete codes and back, with a density over the codes."""

__version__ = "0.1.0"
