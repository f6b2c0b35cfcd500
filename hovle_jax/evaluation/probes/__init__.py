"""Linear probes of a CLIP's features: logistic regression, ridge, a few shots of each class."""
