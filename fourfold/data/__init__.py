"""Data: fetched corpora, synthetic tasks, the training mixture, packing and held-out suites."""
