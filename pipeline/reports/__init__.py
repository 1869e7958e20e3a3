"""Compare runs: what their folders say, as one page for a browser."""
