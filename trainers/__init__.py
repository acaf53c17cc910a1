"""Training scripts, run from a checkout: `python -m trainers.digits`."""
