"""Scores of samples: research metrics on private test data, labelled so, and noisy ones that are charged."""
