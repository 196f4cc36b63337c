"""AsyncTLS (arXiv 2604.07815): blocks, then tokens, with the KV on the host and moved before it is needed."""
