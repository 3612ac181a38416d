"""Folders as people really have them, each in a few lines, read as a new user would read them."""
