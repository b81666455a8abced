"""Faults at every call: the real trainer and the real operator, killed and lied to, and what must hold."""
