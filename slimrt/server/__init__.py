"""``slimrt serve``: OpenAI's and Anthropic's HTTP interfaces on one model (extra ``slimrt[server]``)."""
