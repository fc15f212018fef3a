"""One experiment each: its difference from the defaults, with its command on top."""
