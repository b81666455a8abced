"""Text → packed sequences of tokens, a held-out split and a resumable order."""
