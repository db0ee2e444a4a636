"""Keys and values of the tokens read: caches, the store behind a budget, and the ring that brings rows back."""
