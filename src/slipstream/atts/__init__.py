"""A1 / ATTS (arXiv 2509.15148): a draft model thinks, a target model verifies, a certificate says how often."""
