"""Guesses at the next tokens, so that one pass reads several: the text is the same, and sooner there."""
