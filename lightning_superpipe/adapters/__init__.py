"""Translations between frameworks and the session, one file each."""
