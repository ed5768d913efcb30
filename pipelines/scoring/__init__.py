"""Parts of ``vqgen score``: which images, their codes' bits with and without labels, what is written and drawn."""
