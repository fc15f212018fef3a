"""The engine without any framework: its parts one by one, its fences, its memory, its loads."""
