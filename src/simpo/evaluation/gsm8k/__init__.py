"""GSM8K by exact match: a quick look at what alignment did to arithmetic."""
