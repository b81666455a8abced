"""Decisions: pure functions from what was seen to a status and actions. No clock, no network."""
