"""AsyncSpade (arXiv 2510.07486): predict the next query, select for it beside the forward pass."""
