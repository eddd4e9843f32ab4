"""Human judgments: a local page on which people compare answers, and what their judgments are worth."""
