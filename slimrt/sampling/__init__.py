"""Samplers with a state or a language of their own: DRY and mirostat."""
