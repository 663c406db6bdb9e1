"""What makes every number and picture: run as `python -m experiments.tables`."""
