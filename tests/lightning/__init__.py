"""Lightning's life cycle under the strategy; `stories.py` says how runs are compared."""
