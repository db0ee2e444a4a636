"""What is run by hand or by ``make``, from the repository's root; not installed."""
