"""The composition root, where all objects of a worker are created and connected."""
