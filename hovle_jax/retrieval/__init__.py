"""Looking vectors up among many: exact nearest neighbours, ranks, an index of images on disk."""
