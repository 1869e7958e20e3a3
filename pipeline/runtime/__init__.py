"""Launch processes, exchange between ranks, handle signals, files, locks and errors. No GANs."""
