"""Human judgments: a local web page for comparing answers, and how reliable the judgments are."""
