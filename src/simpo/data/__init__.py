"""Files and hub data sets to tokenized comparisons. Knows neither torch nor training."""
