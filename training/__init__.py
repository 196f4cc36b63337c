"""How the embedded models were made. Runs with ``PYTHONPATH=src python -m training.train``."""
