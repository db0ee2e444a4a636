"""Documents that were read, kept on disk for whoever reads them next."""
