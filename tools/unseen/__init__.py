"""The unseen networks: published families, written here from their papers' tables, that no predictor is fitted on."""
