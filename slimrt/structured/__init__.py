"""Answers that match a JSON schema or a grammar, whatever the sampler does."""
