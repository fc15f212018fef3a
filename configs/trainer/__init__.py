"""Arguments of Lightning's Trainer; strategy, callbacks and logger come from their own groups."""
