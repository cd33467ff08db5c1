"""Installed in a worker only: presence, fenced attempts."""
